"""Closing the gaps that removed tokens leave in the positions of a prompt."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import OpenedModel
from sinklens.models.sums import states_of

from .batch import Batch, text_config
from .interventions import removed, shape_of


@contextmanager
def renumbered(opened: OpenedModel, batch: Batch, gone: Bool[Tensor, "batch token"]) -> Iterator[None]:
    """Tokens get the positions they would have without the ones that are gone; generated tokens too.

    Raises:
        ModelError: Positions of this model are not one number per token, or a sliding window counts them.
    """
    stack = opened.anatomy.main.blocks[0].path.rpartition(".")[0]
    module = opened.module.get_submodule(stack.rpartition(".")[0])
    if "position_ids" not in inspect.signature(module.forward).parameters:
        raise _refusal(opened, f"{type(module).__name__} takes no position_ids.")
    config = text_config(opened.module)
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        raise _refusal(
            opened,
            "Its positions are three numbers per token (M-RoPE), and a grid with holes has no shorter one.",
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise _refusal(
            opened, "Some layers see a window of positions, which would count the tokens that are gone."
        )
    hook = _Renumber(batch, gone)
    with removed(module.register_forward_pre_hook(hook, with_kwargs=True)):
        yield


def _refusal(opened: OpenedModel, why: str) -> ModelError:
    return ModelError(
        f"Positions of {opened.anatomy.family} cannot be renumbered after tokens are removed.",
        detail=why,
        hint="Keep the positions: TokensRemoved(positions='keep').",
    )


class _Renumber:
    def __init__(self, batch: Batch, gone: Bool[Tensor, "batch token"]) -> None:
        self.batch, self.gone = batch, gone
        valid = torch.ones_like(gone) if batch.valid is None else batch.valid.cpu()
        self.valid = valid
        self.positions = ((valid & ~gone).long().cumsum(1) - 1).clamp(min=0)
        self.fewer = (gone & valid).sum(1, keepdim=True)
        self.begun = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        state = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
        state = state if isinstance(state, Tensor) else states_of(args, kwargs)
        assert state is not None
        rows, tokens = shape_of(self.batch)
        cache = kwargs.get("past_key_values")
        done = int(cache.get_seq_length()) if cache is not None else 0
        if not done:
            self.begun = tuple(state.shape[:2]) == (rows, tokens)
            if not self.begun:
                return None
            kwargs = {**kwargs, "position_ids": self.positions.to(state.device)}
            if kwargs.get("attention_mask") is None:
                # Without a mask transformers takes positions that do not rise by one for the bounds of packed texts.
                kwargs["attention_mask"] = self.valid.long().to(state.device)
            return args, kwargs
        if not self.begun or state.shape[0] != rows:
            return None
        given = kwargs.get("position_ids")
        if given is None:
            padded = tokens - self.valid.sum(1, keepdim=True)
            given = torch.arange(done, done + state.shape[1])[None] - padded
        return args, {**kwargs, "position_ids": given.to(state.device) - self.fewer.to(state.device)}
