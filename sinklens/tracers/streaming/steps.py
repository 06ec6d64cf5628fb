"""Who goes through the blocks: one process with all batches, or several in step, each with its own.

Processes in step read every block each, but none begins a block before all have left the one before. So they read the
same files at about the same time, and on one machine the system's page cache serves all but the first. Sending blocks
from one process to the others would take a copy through sockets per process, and a reader that dies amid a transfer
would leave the others in it; who waits here listens for heartbeats.
"""

from __future__ import annotations

from collections.abc import Sequence

from sinklens.inputs.spec import Prompt

from ..team import Team


class Alone:
    """One process takes all batches.

    Attributes:
        batches: Those of all processes: the probe is chosen among them, so that it is the same everywhere.
        leads: Whether this process writes what there is one of.
    """

    leads = True

    def __init__(self, batches: Sequence[list[Prompt]]) -> None:
        self.batches = batches

    @property
    def mine(self) -> list[list[Prompt]]:
        """The batches that pass through this process."""
        return [list(batch) for batch in self.batches]

    def reached(self, index: int) -> None:
        """This process has come to a block; returns when all have, so that they have left the one before."""

    def least(self, name: str, mine: int) -> int:
        """The least of what the processes say."""
        return mine

    def total(self, name: str, mine: int) -> int:
        """The sum of what the processes say."""
        return mine

    def passed(self, mine: int) -> int:
        """A running count over all processes, after this one's has become `mine`."""
        return mine

    @property
    def prompts(self) -> int:
        """Prompts that pass, in all."""
        return sum(map(len, self.batches))


class InStep(Alone):
    """One of several processes; those for which there is no batch take no part.

    Args:
        team: All of them, each of which has the same batches.
    """

    def __init__(self, team: Team, batches: Sequence[list[Prompt]]) -> None:
        super().__init__(batches)
        self.team, self.leads = team, team.leads
        self.shares = shared_out(batches, team.size)
        self.taking_part = sum(map(bool, self.shares))
        self._said = 0

    @property
    def mine(self) -> list[list[Prompt]]:
        return self.shares[self.team.rank]

    def reached(self, index: int) -> None:
        self._agree(f"block {index}", 0)

    def least(self, name: str, mine: int) -> int:
        return min(self._agree(name, mine))

    def total(self, name: str, mine: int) -> int:
        return sum(self._agree(name, mine))

    def passed(self, mine: int) -> int:
        more, self._said = mine - self._said, mine
        return self.team.count("passed", more)

    def _agree(self, name: str, mine: int) -> list[int]:
        return self.team.agree(f"in step/{name}", mine, among=self.taking_part)


def shared_out(batches: Sequence[list[Prompt]], processes: int) -> list[list[list[Prompt]]]:
    """The batches of each process: about as many tokens each, the first processes first where batches are few.

    They stay with their process, because what they left behind in the last block is in its memory.
    """
    shares: list[list[list[Prompt]]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for batch in sorted(batches, key=lambda batch: -len(batch) * len(batch[0])):
        least = tokens.index(min(tokens))
        shares[least].append(list(batch))
        tokens[least] += len(batch) * len(batch[0])
    return shares
