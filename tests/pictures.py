"""Prompts with pictures for tiny vision-language models, spans made by hand, and layers run by hand on some rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.inputs.spec import Prompt, Visual
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.tracers.batch import Batch, collate, forward
from tests.families import FAMILIES, IMAGE, VISION_END, VISION_START, build, inputs

VLMS = [name for name, family in FAMILIES.items() if family.kind == "vlm"]


def opened_vlm(family: str, dtype: torch.dtype = torch.float32, *, eager: bool = False) -> OpenedModel:
    """A tiny model; with `eager`, attention masks are always explicit."""
    model = build(family, dtype=dtype)
    if eager:
        model.set_attn_implementation("eager")
    text = model.config.get_text_config()
    info = ModelInfo(
        family, None, family, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
        text.hidden_size, 0, str(dtype), vocab_size=text.vocab_size,
    )  # fmt: skip
    return OpenedModel(model, None, find_anatomy(model), info)


def picture_prompt(family: str, length: int = 13, seed: int = 1, index: int = 0) -> Prompt:
    """BOS, a start mark, one picture, an end mark, and text."""
    given: dict[str, Any] = inputs(family, batch=1, length=length, seed=seed)
    ids = given.pop("input_ids")[0]
    given.pop("attention_mask")
    kinds = np.full(len(ids), Kind.QUESTION)
    places = np.flatnonzero((ids == IMAGE).numpy())
    kinds[: places[0]] = Kind.SYSTEM
    kinds[(ids == VISION_START).numpy() | (ids == VISION_END).numpy()] = Kind.DELIMITER
    kinds[places] = Kind.VISUAL
    rows = int(len(places) ** 0.5)
    while len(places) % rows:
        rows -= 1
    grid = PatchGrid(0, "whole", places.reshape(rows, -1), (0.0, 0.0, 32.0, 32.0))
    spans = ModalitySpans(kinds, (Picture("made.png", 32, 32, "00"),), (grid,))
    thumbnail = np.zeros((8, 8, 3), dtype=np.uint8)
    tokens = tuple(map(int, ids))
    return Prompt(
        index, tokens, tuple(map(str, tokens)), f"made:{index}", "", Visual(spans, given, (thumbnail,))
    )


def batch_for(prompt: Prompt, dtype: torch.dtype = torch.float32) -> Batch:
    batch = collate([prompt])
    pixels = batch.inputs["pixel_values"].to(dtype)
    return Batch({**batch.inputs, "pixel_values": pixels}, batch.valid, batch.prompts)


class ByHand:
    """The decoder layers of a model, to be run on any rows: what a plain eager pass gave them, cut by hand."""

    def __init__(self, opened: OpenedModel, batch: Batch) -> None:
        self.opened = opened
        module: Any = opened.module
        self.blocks = [module.get_submodule(block.path) for block in opened.anatomy.main.blocks]
        stack = opened.anatomy.main.blocks[0].path.rpartition(".")[0].rpartition(".")[0]
        self.text = module.get_submodule(stack)
        self.given: list[dict[str, Any]] = []
        self.outer: dict[str, Any] = {}
        self.entered = torch.empty(0)
        handles = [self.text.register_forward_pre_hook(self._outer, with_kwargs=True)]
        handles += [block.register_forward_pre_hook(self._inner, with_kwargs=True) for block in self.blocks]
        forward(module, batch)
        for handle in handles:
            handle.remove()

    def _outer(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.outer = dict(kwargs)

    def _inner(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        state = args[0] if args else named.pop("hidden_states")
        if not self.given:
            self.entered = state.clone()
        self.given.append({**named, "past_key_values": None})

    def run(self, present: Callable[[int], Tensor]) -> Tensor:
        """Logits of the rows of the last layer when layer `l` runs on the rows `present(l)` only."""
        module: Any = self.opened.module
        state = self.entered.clone()
        deep = self.outer.get("deepstack_visual_embeds")
        at = self.outer.get("visual_pos_masks")
        with torch.no_grad():
            for layer, block in enumerate(self.blocks):
                rows = present(layer).nonzero()[:, 0]
                named = {key: _cut(key, value, rows) for key, value in self.given[layer].items()}
                made = block(state[:, rows], **named)
                state[:, rows] = made[0] if isinstance(made, tuple) else made
                if deep is not None and at is not None and layer < len(deep):
                    mine = at[0] & present(layer)
                    state[0, mine] += deep[layer][mine[at[0]]]
            last = present(len(self.blocks) - 1).nonzero()[:, 0]
            logits = module.lm_head(self.text.norm(state[:, last]))[0]
        cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _cut(name: str, value: Any, rows: Tensor) -> Any:
    if name == "attention_mask":
        return value[..., rows, :][..., rows]
    if name.startswith("position_embeddings"):
        return tuple(part[..., rows, :] for part in value)
    if name in ("position_ids", "cache_position") and value is not None:
        return value[..., rows]
    return value


def processed(name: str, *, eager: bool = False) -> tuple[OpenedModel, Batch]:
    """A tiny model of a class, and a picture with a question through its real processor."""
    from sinklens.inputs.vision.load import load_pictures
    from tests import vlms

    model = vlms.build(name)
    if eager:
        model.set_attn_implementation("eager")
    picture = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    question = "how many things are in the picture ?"
    prompts = load_pictures([picture], vlms.processor(name), model.config, question=question)
    anatomy = find_anatomy(model)
    main = anatomy.main
    info = ModelInfo(
        name, None, name, len(main.blocks), main.heads, main.kv_heads, main.hidden_size, 0, "float32"
    )
    return OpenedModel(model, None, anatomy, info), collate(prompts.prompts)
