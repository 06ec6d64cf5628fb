"""Paint a spot into a picture and see, through processor and model, which tokens and which patches change.

The vision tower is made local: its attention writes nothing, so what a patch becomes depends on that patch alone and
the answer is unambiguous. Nothing here knows a layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sinklens.inputs.spec import Prompt
from sinklens.inputs.vision import load_pictures
from sinklens.models.anatomy import find_anatomy
from tests.vlms import build, processor


@dataclass
class Painted:
    """Changes made by one spot: per position of the prompt, and per place in the vision tower's sequence."""

    prompt: Prompt
    tokens: np.ndarray
    patches: np.ndarray


@dataclass
class Bench:
    """A local model of one class with its processor."""

    model: Any
    processor: Any
    inputs: str
    block: str

    @classmethod
    def of(cls, name: str, **changes: Any) -> Bench:
        model = build(name)
        towers = {tower.name: tower for tower in find_anatomy(model).towers}
        for block in towers["vision"].blocks:
            for parameter in model.get_submodule(block.attention_output).parameters():
                torch.nn.init.zeros_(parameter)
        made = processor(name)
        for key, value in changes.items():
            setattr(made.image_processor, key, value)
        return cls(model, made, towers["text"].blocks[0].path, towers["vision"].blocks[0].path)

    def load(self, pictures: list[np.ndarray], **options: Any) -> Prompt:
        options = {"question": "how many ?", **options}
        return load_pictures([pictures], self.processor, self.model.config, **options).prompts[0]

    def features(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """What enters the first text block, by position; what leaves the first vision block, by place."""
        seen: dict[str, torch.Tensor] = {}

        def text(_: Any, args: Any, kwargs: Any) -> None:
            seen["text"] = (args[0] if args else kwargs["hidden_states"]).detach()

        def vision(_: Any, args: Any, output: Any) -> None:
            seen["vision"] = (output[0] if isinstance(output, tuple) else output).detach()

        hooks = [
            self.model.get_submodule(self.inputs).register_forward_pre_hook(text, with_kwargs=True),
            self.model.get_submodule(self.block).register_forward_hook(vision),
        ]
        assert prompt.visual is not None
        try:
            with torch.no_grad():
                self.model(
                    input_ids=torch.tensor([prompt.token_ids]), use_cache=False, **prompt.visual.inputs
                )
        finally:
            for hook in hooks:
                hook.remove()
        return seen["text"][0].numpy(), seen["vision"].reshape(-1, seen["vision"].shape[-1]).numpy()

    def paint(
        self, pictures: list[np.ndarray], which: int, left: int, top: int, wide: int, high: int
    ) -> Painted:
        """Invert a box of one picture, and compare."""
        before = self.load(pictures)
        changed = [picture.copy() for picture in pictures]
        spot = changed[which][top : top + high, left : left + wide]
        spot[...] = 255 - spot
        after = self.load(changed)
        assert before.token_ids == after.token_ids
        (text, vision), (text_now, vision_now) = self.features(before), self.features(after)
        return Painted(
            before, np.linalg.norm(text_now - text, axis=-1), np.linalg.norm(vision_now - vision, axis=-1)
        )


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture that is dark at random, so that an inverted spot is a strong change everywhere."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
