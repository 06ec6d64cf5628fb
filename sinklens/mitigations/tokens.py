"""What the running forward pass says of its tokens: how many are in the cache, which are padding.

Attention functions see keys, not tokens: a sliding cache has dropped the first ones, a static cache has room for
later ones, padding may stand in front. Mitigations name tokens, so the model's own arguments are read on their way in.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sinklens.core.errors import DataError, ModelError
from sinklens.kernels.shapes import visible_of
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import Tower
from sinklens.tracers.batch import Batch, running

from .generating import Generation, listening


@dataclass
class Tokens:
    """Tokens of the running pass.

    Attributes:
        passes: Forward passes begun.
        past: Tokens that were in the cache when the pass began. 0 starts a new input.
        inputs: Inputs begun; whatever was learned from an earlier one no longer holds.
        prompt: Tokens of the prompt: those of the first pass over the input, or what generate() says it is.
        reading: Whether the pass reads (a piece of) a prompt.
        generation: What generate() is about, where it runs.
        ids: Their ids, cached ones included; None where the model was not given them.
        batch: The prompts of the pass, where it is one of a trace.
    """

    passes: int = 0
    past: int = 0
    inputs: int = 0
    prompt: int = 0
    reading: bool = True
    generation: Generation = field(default_factory=Generation)
    ids: Tensor | None = None
    batch: Batch | None = None
    _mask: Tensor | None = None
    _real: Tensor | None = None
    _known: Tensor | None = None
    _inner: int = -1
    memo: dict[Any, Any] = field(default_factory=dict)
    """What was worked out for an earlier layer of the same pass and holds for later ones."""

    @contextmanager
    def watched(self, model: nn.Module, tower: Tower) -> Iterator[Tokens]:
        """Read the arguments of every module from the model down to the tower's stack of blocks."""
        with ExitStack() as stack:
            for depth, path in enumerate(_around(tower)):
                module = model.get_submodule(path)
                if depth == 0:
                    self.generation = stack.enter_context(listening(module))
                hook = module.register_forward_pre_hook(self._hook(depth, module), with_kwargs=True)
                stack.callback(hook.remove)
            yield self

    def _hook(self, depth: int, module: nn.Module) -> Callable[..., None]:
        names = list(inspect.signature(module.forward).parameters)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            # Inner modules run after outer ones, so a pass begins where the depth does not grow.
            outermost = depth <= self._inner or not self.passes
            self._inner = depth
            if outermost:
                self.passes += 1
                self.past, self._mask = 0, None
                self.memo.clear()
                self._known, self._real = self._real, None
            cache = given.get("past_key_values")
            if cache is not None:
                self.past = _cached(cache)
            if outermost and self.past == 0:
                self.inputs += 1
                self._known = None
            if outermost:
                self._read(given.get("input_ids"))
            mask = given.get("attention_mask")
            if isinstance(mask, dict):
                mask = mask.get("full_attention", next(iter(mask.values()), None))
            if isinstance(mask, Tensor) and (self._mask is None or mask.ndim == 2):
                self._mask = mask

        return hook

    def _read(self, ids: Any) -> None:
        """Take in the ids of the pass."""
        self.batch = running()
        ids = ids if isinstance(ids, Tensor) and ids.ndim == 2 else None
        self.reading = self.past == 0 or self.generation.prefilling
        if self.reading:
            # Without a cache generate() gives prompt and answer together, again and again.
            self.prompt = self.generation.prompt or (0 if ids is None else ids.shape[1])
        if self.past == 0:
            self.ids = ids
            return
        before, self.ids = self.ids, None
        if ids is None or before is None or len(ids) != len(before) or before.shape[1] < self.past:
            return
        self.ids = torch.cat([before[:, : self.past], ids], 1)

    def whole(self, queries: int) -> bool:
        """Whether a pass of `queries` tokens reaches the end of the prompt."""
        return self.past + queries >= self.prompt

    def real(self, call: AttentionCall) -> Bool[Tensor, "batch token"]:
        """Which tokens, cached ones included, are not padding.

        Raises:
            ModelError: The pass did not come through the model, or its mask does not fit.
        """
        return self.real_of(call.query.shape[0], call.query.shape[2], call.query.device)

    def real_of(self, batch: int, queries: int, device: torch.device) -> Bool[Tensor, "batch token"]:
        """The same for a pass of `queries` tokens, wherever in the model they are seen."""
        total = self.past + queries
        if self.passes == 0:
            raise ModelError(
                "The attention of this model ran without its model.",
                detail="A mitigation reads padding and cache from the arguments of the model's own forward pass.",
                hint="Call the model, not one of its blocks.",
            )
        if self._real is None or self._real.shape != (batch, total):
            self._real = self._found(batch, total, device)
            self.memo.clear()
        self._real = self._real.to(device)
        return self._real

    def _found(self, batch: int, total: int, device: torch.device) -> Tensor:
        mask = self._mask
        if mask is not None and mask.ndim == 2:
            if mask.shape[0] != batch or mask.shape[1] < total:
                raise DataError(
                    "The attention mask does not cover the tokens in the cache.",
                    detail=f"Expected at least {(batch, total)} (batch, tokens), found {tuple(mask.shape)}.",
                    hint="Pass the mask of the whole sequence, as generate() does.",
                )
            return mask[:, :total].to(device) != 0
        known = self._known
        if self.past == 0 and mask is not None and mask.ndim == 4:
            known = _own_keys(visible_of(mask).to(device)).expand(batch, -1)
        if known is None or known.shape[0] != batch:
            return torch.ones(batch, total, dtype=torch.bool, device=device)
        later = max(0, total - known.shape[1])
        return torch.cat([known[:, :total], known.new_ones(batch, later)], 1)

    def places(
        self, positions: tuple[int, ...], call: AttentionCall
    ) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
        """Where the given positions of each prompt's own tokens stand among all tokens, and whether they do."""
        real = self.real(call)
        key = "places", positions, real.device
        if key not in self.memo:
            count = real.long().cumsum(1)
            asked = torch.tensor(positions, device=real.device)[None, :, None] + 1
            found = (count[:, None] == asked) & real[:, None]
            self.memo[key] = found.int().argmax(-1), found.any(-1)
        return self.memo[key]


def _around(tower: Tower) -> list[str]:
    """Paths of the modules that lead to the tower's blocks, the model itself first."""
    parts = tower.blocks[0].path.split(".")[:-2]  # without the block and its list
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _cached(cache: Any) -> int:
    if not hasattr(cache, "get_seq_length"):
        raise ModelError(
            f"A cache of type {type(cache).__name__} does not tell how many tokens it holds.",
            hint="Use a cache of transformers, for instance DynamicCache.",
        )
    return int(cache.get_seq_length())


def _own_keys(visible: Bool[Tensor, "batch head query key"]) -> Bool[Tensor, "batch query"]:
    """Tokens of a first pass that are real, told from who sees whom.

    They see themselves, and the last is seen by itself alone. Rows of padding see nothing, or, where libraries avoid
    empty rows, everything.
    """
    seen = visible[:, 0]
    queries = seen.shape[1]
    own = seen.diagonal(0, 1, 2)[:, :queries]
    everything = seen[:, :, queries - 1].clone()
    everything[:, -1] = False
    return own & ~everything
