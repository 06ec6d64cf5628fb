"""The embedding lens: which tokens of the vocabulary a state points to, by the input embedding (arXiv 2603.00510)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinklens.models.spec import OpenedModel

from .batch import text_config
from .signals_pictures import REASONS

CHUNK = 8192
"""Rows of the vocabulary that are compared at a time."""
_PLACEHOLDERS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "audio_token_id",
    "audio_token_index",
)


@dataclass(frozen=True)
class Vocabulary:
    """The input embedding of a model and the rows of it that count.

    Attributes:
        matrix: As the model holds it.
        excluded: Rows that are no neighbours.
        counts: How many were left out for each of `REASONS`; a row counts for the first that holds.
    """

    matrix: Float[Tensor, "vocab dim"]
    excluded: Bool[Tensor, " vocab"]
    counts: tuple[int, ...]


_known: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Vocabulary]] = WeakKeyDictionary()


def vocabulary(opened: OpenedModel) -> Vocabulary | None:
    """The vocabulary of a model's language tower; None if it has no token embedding in memory.

    Looked at once per model, and again when the embedding was changed.
    """
    path = opened.anatomy.main.embedding
    module = None if path is None else opened.module.get_submodule(path)
    weight = getattr(module, "weight", None)
    if module is None or not isinstance(weight, Tensor) or weight.ndim != 2 or weight.device.type == "meta":
        return None
    state = (weight.data_ptr(), weight._version)
    if module not in _known or _known[module][0] != state:
        _known[module] = (state, _looked_at(opened, weight.detach()))
    return _known[module][1]


def _looked_at(opened: OpenedModel, weight: Tensor) -> Vocabulary:
    size = len(weight)
    marks = torch.zeros(len(REASONS), size, dtype=torch.bool)
    config: Any = opened.module.config
    tokenizer: Any = opened.tokenizer
    texts = text_config(opened.module)
    pad = next(
        (
            p
            for p in (getattr(tokenizer, "pad_token_id", None), getattr(texts, "pad_token_id", None))
            if p is not None
        ),
        None,
    )
    meaning = {
        getattr(source, name, None)
        for source in (tokenizer, texts)
        for name in ("bos_token_id", "eos_token_id", "unk_token_id")
    }
    if isinstance(pad, int) and 0 <= pad < size and pad not in meaning:
        marks[0, pad] = True
    for name in _PLACEHOLDERS:
        place = getattr(config, name, None)
        if isinstance(place, int) and 0 <= place < size:
            marks[1, place] = True
    if tokenizer is not None and hasattr(tokenizer, "__len__") and 0 < len(tokenizer) < size:
        marks[2, len(tokenizer) :] = True
    marks[3] = repeated_rows(weight).cpu()
    first = marks & (marks.cumsum(0) == 1)
    return Vocabulary(weight, marks.any(0).to(weight.device), tuple(first.sum(1).tolist()))


def repeated_rows(matrix: Float[Tensor, "vocab dim"]) -> Bool[Tensor, " vocab"]:
    """Rows that are zero, or equal to another row to the last bit.

    By a sum of the bits of each row, with odd random weights modulo 2^64; rows with equal sums are then compared.
    """
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (matrix.shape[1],), generator=generator) | 1
    weights = weights.to(matrix.device)
    sums = torch.cat([
        (rows.contiguous().view(kinds[rows.element_size()]).long() * weights).sum(1) for rows in matrix.split(CHUNK)
    ])  # fmt: skip
    _, group, counts = sums.unique(return_inverse=True, return_counts=True)
    out = torch.cat([(rows == 0).all(1) for rows in matrix.split(CHUNK)])
    for value in (counts > 1).nonzero()[:, 0].tolist():
        members = (group == value).nonzero()[:, 0]
        out[members[(matrix[members] == matrix[members[0]]).all(1)]] = True
    return out


def nearest_tokens(
    states: Float[Tensor, "token dim"], words: Vocabulary, count: int
) -> tuple[Float[Tensor, "token rank"], Int[Tensor, "token rank"]]:
    """The `count` rows of the vocabulary with the largest cosine, with their ids; chunk by chunk, in float32.

    The lower id wins a tie. Ranks beyond the vocabulary hold NaN and -1.
    """
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    best = torch.full((len(states), 0), 0.0, device=states.device)
    ids = torch.zeros(len(states), 0, dtype=torch.long, device=states.device)
    for start, rows in _chunks(words.matrix):
        rows = torch.nn.functional.normalize(rows.to(states.device).float(), dim=-1)
        cosine = unit @ rows.mT
        gone = words.excluded[start : start + len(rows)].to(states.device)
        cosine = cosine.masked_fill(gone, float("-inf"))
        both = torch.cat([best, cosine], 1)
        own = torch.arange(start, start + len(rows), device=states.device).expand(len(states), -1)
        both_ids = torch.cat([ids, own], 1)
        best, order = both.sort(dim=1, descending=True, stable=True)
        best, order = best[:, :count], order[:, :count]
        ids = both_ids.gather(1, order)
    none = best.isneginf()
    best, ids = best.masked_fill(none, float("nan")), ids.masked_fill(none, -1)
    missing = max(0, count - best.shape[1])
    pad = torch.nn.functional.pad
    return pad(best, (0, missing), value=float("nan")), pad(ids, (0, missing), value=-1)


def _chunks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(matrix), CHUNK):
        yield start, matrix[start : start + CHUNK]
