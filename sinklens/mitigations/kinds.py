"""Which tokens of the running pass are visual, delimiters or text, and which of them are sinks by their states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.inputs.spans import Kind
from sinklens.inputs.vision.assemble import image_token_id, marks_around
from sinklens.kernels.spec import AttentionCall
from sinklens.models.spec import OpenedModel, Tower
from sinklens.tracers.sink_dims import Cut, phi
from sinklens.tracers.states import input_tap

from .seen import Seen
from .tokens import Tokens


def kinds_of(tokens: Tokens, call: AttentionCall, config: Any) -> Int[Tensor, "batch token"]:
    """The `Kind` of every token of the running pass, cached ones and padding included (padding is SYSTEM).

    Where the pass belongs to prompts whose spans are known, those say it. Otherwise the token ids do: image and video
    tokens of the config are visual, the marks around them delimiters, other tokens before the first visual one belong
    to the system prompt and those after it to the question. Tokens that came after the first pass were generated.

    Raises:
        ModelError: The model was given embeddings in place of token ids.
    """
    real = tokens.real(call)
    key = "kinds", real.device
    if key not in tokens.memo:
        found = _of_spans(tokens, real)
        tokens.memo[key] = _of_ids(tokens, real, config) if found is None else found
    return tokens.memo[key]


def _of_spans(tokens: Tokens, real: Bool[Tensor, "batch token"]) -> Tensor | None:
    batch = tokens.batch
    if batch is None or not any(prompt.visual is not None for prompt in batch.prompts):
        return None
    found = torch.full(real.shape, int(Kind.SYSTEM), device=real.device)
    for row, prompt in enumerate(batch.prompts):
        places = real[row].nonzero()[:, 0]
        if prompt.visual is None:
            found[row, places] = Kind.QUESTION
            continue
        kinds = torch.as_tensor(prompt.visual.spans.kinds, device=real.device)
        found[row, places[: len(kinds)]] = kinds[: len(places)]
        found[row, places[len(kinds) :]] = Kind.GENERATED
    return found


def _of_ids(tokens: Tokens, real: Bool[Tensor, "batch token"], config: Any) -> Tensor:
    ids = tokens.ids
    if ids is None or tuple(ids.shape) != tuple(real.shape):
        raise ModelError(
            "Which tokens are visual cannot be told: the model was not given the ids of all tokens.",
            hint="Pass input_ids, also those before the cache, inside of the `with` block.",
        )
    ids = ids.to(real.device)
    visual = torch.isin(ids, torch.tensor(visual_ids(config), device=ids.device)) & real
    seen = visual.long().cumsum(1) > 0
    found = torch.where(seen, int(Kind.QUESTION), int(Kind.SYSTEM))
    # Without a picture all text is the question.
    found = torch.where(visual.any(1, keepdim=True) | ~real, found, int(Kind.QUESTION))
    marks = torch.tensor(sorted(marks_around(config, None)), device=ids.device, dtype=ids.dtype)
    found = torch.where(torch.isin(ids, marks), int(Kind.DELIMITER), found)
    found = torch.where(visual, int(Kind.VISUAL), found)
    found[:, tokens.prompt :] = int(Kind.GENERATED)
    return torch.where(real, found, int(Kind.SYSTEM))


def visual_ids(config: Any) -> list[int]:
    """Ids that stand for tokens of pictures and videos; empty for a model that reads text only."""
    found = [image_token_id(config), getattr(config, "video_token_id", None)]
    found.append(getattr(config, "video_token_index", None))
    return [token for token in dict.fromkeys(found) if isinstance(token, int)]


def needs_pictures(title: str, model: nn.Module | OpenedModel) -> Any:
    """The config of a model that reads pictures.

    Raises:
        ModelError: It reads text only.
    """
    module = model.module if isinstance(model, OpenedModel) else model
    config: Any = module.config
    if not visual_ids(config):
        raise ModelError(
            f"{title} needs a model that reads pictures.",
            detail=f"The config of {type(module).__name__} names no image token.",
        )
    return config


def choosing_rows(seen: Seen) -> Bool[Tensor, "batch query"]:
    """Rows that choose a token: that of the last token of each prompt, and those of the answer behind it.

    None in a pass that reads a prompt in pieces and does not reach its end.
    """
    tokens, queries = seen.tokens, seen.call.query.shape[2]
    real = tokens.real(seen.call)
    key = "choosing", real.device
    if key not in tokens.memo:
        given = real & (kinds_of(tokens, seen.call, seen.config) != int(Kind.GENERATED))
        left = given.flip(1).cumsum(1).flip(1) - given.long()
        tokens.memo[key] = (real & (left == 0) & tokens.whole(queries))[:, tokens.past :]
    return tokens.memo[key]


def picture_of(visual: Bool[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
    """Number of the picture of each visual token: visual tokens that follow each other are one picture."""
    starts = visual & ~torch.nn.functional.pad(visual[:, :-1], (1, 0))
    return starts.long().cumsum(1) - 1


@dataclass
class SinkWatch:
    """Sinks by their states, as the blocks of the running pass read them.

    Attributes:
        update: Whether tokens after the prompt can be sinks too.
    """

    tokens: Tokens
    dims: tuple[int, ...]
    cut: Cut
    update: bool
    _found: dict[int, tuple[int, Tensor]] = field(default_factory=dict)

    @contextmanager
    def attached(self, model: nn.Module, tower: Tower) -> Iterator[SinkWatch]:
        """Look at the state that enters each block."""
        with input_tap(model, tower, self._see):
            yield self

    def _see(self, layer: int, state: Tensor) -> None:
        tokens = self.tokens
        begun, known = self._found.get(layer, (-1, None))
        now = (
            self.cut.reached(phi(state, self.dims)) if self.dims else state.new_zeros(state.shape[:2]).bool()
        )
        if tokens.past == 0 or begun != tokens.inputs or known is None:
            known = now
            if not self.update and tokens.prompt:
                known[:, tokens.prompt :] = False
        elif len(known) == len(now) and known.shape[1] >= tokens.past:
            if self.update and tokens.generation.beams > 1:
                raise ModelError(
                    "Sinks among generated tokens cannot be followed through a beam search.",
                    detail="Beams take over each other's tokens, and what is known of those does not move with them.",
                    hint="Generate with num_beams=1, or leave out update_decode.",
                )
            now = now if self.update or tokens.reading else torch.zeros_like(now)
            known = torch.cat([known[:, : tokens.past], now], 1)
        self._found[layer] = (tokens.inputs, known)

    def sinks(self, layer: int, real: Bool[Tensor, "batch token"]) -> Bool[Tensor, "batch token"]:
        """Sinks among all real tokens of the pass in a block.

        Raises:
            ModelError: The first tokens were not read while the watch was on.
        """
        begun, known = self._found.get(layer, (-1, None))
        if known is None or begun != self.tokens.inputs or known.shape != real.shape:
            raise ModelError(
                "The sinks of this input are not known: it did not begin inside of the `with` block.",
                detail="They are found while the prompt is read, and the cache came from outside.",
                hint="Read the prompt inside of the `with` block too.",
            )
        return known.to(real.device) & real
