"""How a blocked kernel walks `batch x key head x query`: few enough logits in flight to stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from .shapes import Sizes
from .spec import AttentionCall, BlockPlan

# Below this many rows a matrix product no longer runs at full speed, so the budget gives way to it.
_LEAST_ROWS = 32
# Blocks of causal rows compute up to `rows / 2` keys too many per row, so tall blocks waste work.
_MOST_ROWS = 128
_ROWS = 64
# Rows of logits that start at cache lines are up to a third faster to go through.
_ALIGNED = 16


@dataclass(frozen=True)
class Chunk:
    """Batch rows and key heads that are computed together: whole batch rows, or some key heads of one."""

    batch: slice
    kv_heads: slice
    heads: slice

    def of(self, tensor: Tensor) -> Tensor:
        """The chunk of a tensor `[1|batch, 1|head, ...]`, as a view."""
        tensor = tensor[self.batch] if tensor.shape[0] > 1 else tensor
        return tensor[:, self.heads] if tensor.shape[1] > 1 else tensor

    def call(self, call: AttentionCall) -> AttentionCall:
        """The chunk's own attention call; all its tensors are views. Rows that count are left to the caller."""
        return replace(
            call,
            query=call.query[self.batch, self.heads],
            key=call.key[self.batch, self.kv_heads],
            value=call.value[self.batch, self.kv_heads],
            mask=None if call.mask is None else self.of(call.mask[(None,) * (4 - call.mask.ndim)]),
            learned_sinks=None if call.learned_sinks is None else call.learned_sinks[self.heads],
            counted=None,
            edits=tuple(edit.of(self.batch, self.heads) for edit in call.edits),
        )


def row_blocks(sizes: Sizes, plan: BlockPlan) -> list[tuple[int, int]]:
    """Ranges of query rows, the same for every chunk."""
    units, per_row = sizes.batch * sizes.kv_heads, sizes.group * sizes.keys
    rows = plan.scores // (units * per_row)
    if rows < _ROWS:
        rows = max(min(_ROWS, plan.scores // per_row), -(-_LEAST_ROWS // sizes.group))
    if rows > _ALIGNED:
        rows -= rows % _ALIGNED
    rows = max(1, min(rows, _MOST_ROWS, sizes.queries))
    return [(start, min(start + rows, sizes.queries)) for start in range(0, sizes.queries, rows)]


def chunks(sizes: Sizes, plan: BlockPlan, rows: int) -> Iterator[Chunk]:
    """Pieces of `batch x key head` whose blocks of `rows` rows fit the budget."""
    units = max(1, plan.scores // (rows * sizes.group * sizes.keys))
    pieces = -(-sizes.kv_heads // units)
    heads_each = -(-sizes.kv_heads // pieces)  # pieces of equal size
    batch_each = max(1, units // sizes.kv_heads)
    for b in range(0, sizes.batch, batch_each):
        for g in range(0, sizes.kv_heads, heads_each):
            last = min(g + heads_each, sizes.kv_heads)
            yield Chunk(
                slice(b, min(b + batch_each, sizes.batch)),
                slice(g, last),
                slice(g * sizes.group, last * sizes.group),
            )
