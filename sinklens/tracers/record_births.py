"""Signals of births: positions whose state turns into a reference position's, and what their feed-forward part saw.

Who is born is known only at the block's end. The feed-forward part is looked at again then, for the two tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.models.spec import FeedForward, Piece
from sinklens.models.spread import whole_input, whole_output
from sinklens.models.sums import piece

from . import signals as sig
from .experts import Routed, expert_inner, expert_outer, expert_parts
from .ledger import Arrays, Ledger
from .record_writes import added, elsewhere
from .states import BlockPass

BIRTH_SIGNALS = frozenset(signal for signal in sig.ALL_SIGNALS if "birth" in signal.axes)


@dataclass(frozen=True)
class Birth:
    """One alignment."""

    layer: int
    position: int
    reference: int
    cosine: Float[np.ndarray, " part"]
    write_norm: float


class BirthsRecorder:
    """Collects the births of one batch, prompt by prompt and block by block."""

    carried = ("found", "_aligned")

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.found: list[list[Birth]] = [[] for _ in range(ledger.batch.size)]
        self._aligned: list[Bool[Tensor, " pos"] | None] = [None] * ledger.batch.size

    def see(
        self,
        row: int,
        passed: BlockPass,
        norm: Float[Tensor, " pos"],
        cosine: Float[Tensor, "reference pos"],
    ) -> None:
        """Look for births of prompt `row` in one block, given the norms and cosines after it."""
        known = self._aligned[row]
        known = torch.zeros_like(norm, dtype=torch.bool) if known is None else known
        references = self.ledger.references[row]
        aligned = alignment(cosine, norm, references)
        new = aligned.any(0) & ~known
        self._aligned[row] = known | aligned.any(0)
        if passed.before is None or not bool(new.any()):
            return
        before = self.ledger.row(row, passed.before)
        size = torch.linalg.vector_norm(before, dim=-1, dtype=torch.float32)
        # Only what this block brought about: not what a leader that has just changed shows for the first time.
        already = alignment(cosines(before, size, references), size, references)
        fresh = aligned & ~already & new
        _one_of_a_pair(fresh, references, size)
        positions = fresh.any(0).nonzero().squeeze(-1)
        order = norm[positions].argsort(descending=True, stable=True)
        room = sig.BIRTHS - len(self.found[row])
        # A reference that stood out before comes first: two positions born together do not explain each other.
        stood_out = size >= sig.BIRTH_NORM_RATIO * size.median()
        older = torch.tensor(
            [1.0 if bool(stood_out[pos]) else 0.0 for pos in references], device=cosine.device
        )
        strength = torch.where(fresh, cosine.abs() + older[:, None], -1.0)
        for position in positions[order][:room].tolist():
            reference = references[int(strength[:, position].argmax())]
            self.found[row].append(self._birth(row, passed, position, reference))

    def _birth(self, row: int, passed: BlockPass, position: int, reference: int) -> Birth:
        total = passed.block.sum
        write = float("nan")
        if total.exact:
            written = added(
                self.ledger.row(row, passed.made[part.path])[position].float() * part.scale
                for part in total.mlp
            )
            write = 0.0 if written is None else float(written.norm())
        length = passed.after.numel() // passed.after.shape[-1] // self.ledger.batch.size  # pyright: ignore
        places = self.ledger.places(length, torch.device("cpu"))[row][[position, reference]] + row * length
        cosine = np.array([_cosine(part) for part in _parts(passed, self.ledger, places.tolist())])
        return Birth(passed.block.index, position, reference, cosine.astype(np.float32), write)

    def arrays(self, row: int) -> Arrays:
        """The births of a prompt, filled up to `BIRTHS`."""
        found = self.found[row]
        whole = {
            sig.BIRTH_LAYER: [birth.layer for birth in found],
            sig.BIRTH_POSITION: [birth.position for birth in found],
            sig.BIRTH_REFERENCE: [birth.reference for birth in found],
        }
        out: Arrays = {}
        for signal, values in whole.items():
            out[signal.name] = np.full(sig.BIRTHS, -1, dtype=np.int32)
            out[signal.name][: len(found)] = values
        out[sig.BIRTH_COSINE.name] = np.full((sig.BIRTHS, len(sig.PARTS)), np.nan, dtype=np.float32)
        out[sig.BIRTH_WRITE_NORM.name] = np.full(sig.BIRTHS, np.nan, dtype=np.float32)
        for i, birth in enumerate(found):
            out[sig.BIRTH_COSINE.name][i] = birth.cosine
            out[sig.BIRTH_WRITE_NORM.name][i] = birth.write_norm
        return {signal.name: out[signal.name] for signal in BIRTH_SIGNALS & self.ledger.wanted}


def alignment(
    cosine: Float[Tensor, "reference pos"], norm: Float[Tensor, " pos"], references: list[int]
) -> Bool[Tensor, "reference pos"]:
    """Whether a position points along a reference and stands out by its norm; a reference not to itself."""
    large = norm >= sig.BIRTH_NORM_RATIO * norm.median()
    aligned = (cosine.abs() > sig.BIRTH_COSINE_AT) & large
    for slot, reference in enumerate(references):
        if reference >= 0:
            aligned[slot, reference] = False
    return aligned


def cosines(
    x: Float[Tensor, "pos dim"], norm: Float[Tensor, " pos"], references: list[int]
) -> Float[Tensor, "reference pos"]:
    """Cosine of every state with the reference positions' states; NaN for references that are -1."""
    out = torch.full((len(references), len(x)), float("nan"), device=x.device)
    known = [slot for slot, pos in enumerate(references) if 0 <= pos < len(x)]
    if known:
        places = torch.tensor([references[slot] for slot in known], device=x.device)
        # In float32, because a half-precision product is rounded to three digits.
        dots = x.float() @ x[places].float().T
        out[known] = (dots / (norm[:, None] * norm[places]).clamp_min(torch.finfo(torch.float32).tiny)).T
    return out.clamp(-1, 1)


def _one_of_a_pair(
    fresh: Bool[Tensor, "reference pos"], references: list[int], size: Float[Tensor, " pos"]
) -> None:
    """Two references that meet: the leader is born, unless it alone stood out before (`size`)."""
    first, leader = references
    if leader < 0 or not (bool(fresh[0, leader]) and bool(fresh[1, first])):
        return
    stood_out = size >= sig.BIRTH_NORM_RATIO * size.median()
    if bool(stood_out[leader]) and not bool(stood_out[first]):
        fresh[0, leader] = False
    else:
        fresh[1, first] = False


def _cosine(rows: Tensor | None) -> float:
    """Of two rows; NaN if there are none."""
    if rows is None:
        return float("nan")
    return float(torch.nn.functional.cosine_similarity(rows[0].float(), rows[1].float(), dim=0))


def _parts(passed: BlockPass, ledger: Ledger, places: list[int]) -> list[Tensor | None]:
    """Both tokens' rows of each of `sig.PARTS`."""
    block = passed.block
    routed = ledger.routed.get(block.index)
    if block.experts is not None:
        return _mixture_parts(passed, routed, places)
    inner = block.sum.feed_forward
    source = inner.up.path if inner else block.mlp
    read = _rows(passed.given.get(source or ""), places)
    gate = up = act = None
    if inner is not None and read is not None:
        up, gate = _run(passed, inner.up, read), _run(passed, inner.gate, read)
        act = _activated(passed, inner, gate)
    down = block.down_proj or ""
    product = _rows(passed.given.get(down), places)
    product = product if product is None else whole_input(passed.modules[down], product)
    return [read, gate, up, act, product, _rows(passed.made.get(down), places)]


def _rows(tensor: Tensor | None, places: list[int]) -> Tensor | None:
    return None if tensor is None else tensor.detach().reshape(-1, tensor.shape[-1])[places]


@torch.no_grad()
def _run(passed: BlockPass, part: Piece | None, read: Tensor) -> Tensor | None:
    """A projection once more, for two tokens; by `forward`, so that nobody's hooks are called."""
    if part is None or elsewhere(passed.modules[part.path]):
        return None
    module = passed.modules[part.path]
    return piece(whole_output(module, module.forward(read)), part.part)


@torch.no_grad()
def _activated(passed: BlockPass, inner: FeedForward, gate: Tensor | None) -> Tensor | None:
    return None if gate is None else passed.modules[inner.act].forward(gate)


@torch.no_grad()
def _mixture_parts(passed: BlockPass, routed: Routed | None, places: list[int]) -> list[Tensor | None]:
    """In an MoE block: what enters and leaves the mixture, and the inside of the expert that both tokens share.

    That is the expert which adds most to the new position, if the reference is routed to it as well.
    """
    nothing: list[Tensor | None] = [None] * len(sig.PARTS)
    if routed is None or elsewhere(routed.module):
        return nothing
    hidden = routed.hidden[places]
    mixture = _rows(passed.made.get(passed.block.mlp or ""), places)
    inside: list[Tensor | None] = [None] * 4
    chosen, weight = (
        routed.index[places],
        routed.weight.view(-1, routed.slots)[places],
    )
    best, most = -1, -1.0
    for slot, expert in enumerate(chosen[0].tolist()):
        if expert < routed.n_experts and expert not in routed.ablated:
            inner = expert_inner(routed.module, expert, hidden[:1])
            y = expert_outer(routed.module, expert, inner, routed.share)
            size = float(y.float().norm() * weight[0, slot].abs())
            best, most = (expert, size) if size > most else (best, most)
    if best >= 0 and bool((chosen[1] == best).any()):
        inside = [*expert_parts(routed.module, best, hidden), expert_inner(routed.module, best, hidden)]
        if routed.share is not None:
            inside = [None if part is None else routed.share.joined(part) for part in inside]
    return [hidden, *inside, mixture]
