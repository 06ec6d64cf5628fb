"""What the means of writers leave out, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from .spikes import Group, Spike


def reading_notes(spikes: Sequence[Spike]) -> list[str]:
    """What the means leave out, and where they are over prompts of both signs."""
    notes, n = [], len(spikes)
    unread = [spike for spike in spikes if spike.n_unread]
    if unread:
        worst = max(unread, key=lambda spike: spike.n_unread / (len(spike.paths) + spike.n_unread))
        notes.append(
            f"{len(unread)} of {n} entries could not be read in every prompt in which they may stand out, because "
            f"too many others are as large; at worst not in {worst.n_unread} of {len(worst.paths) + worst.n_unread} "
            f"(dim {worst.dim} on position {worst.position}). Means are over the other prompts."
        )
    hidden = sum(any(_hides(spike, group) for group in spike.groups) for spike in spikes)
    if hidden:
        notes.append(
            f"For {hidden} of {n} entries some prompts do not show what the sublayers of a block add, because the "
            "entry is not among the block's 16 largest there; where its value is known, the block is named as a whole."
        )
    mixed = [spike for spike in spikes if spike.same_sign < 1]
    if mixed:
        which = ", ".join(f"dim {spike.dim} on position {spike.position}" for spike in mixed[:3])
        which += ", ..." if len(mixed) > 3 else ""
        notes.append(
            f"The sign of {len(mixed)} of {n} entries differs between prompts ({which}): their values are mean sizes "
            "with the sign of most prompts."
        )
    return notes


def _hides(spike: Spike, group: Group) -> bool:
    """Whether some prompts do not show the sublayers of a block that has a step, for want of a listing."""
    return any(not path.listed[group.layer] and path.change[group.layer] != 0 for path in spike.paths)
