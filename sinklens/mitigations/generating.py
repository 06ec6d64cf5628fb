"""What a model that generates knows and its forward pass does not: how long the prompt is, and how many beams it keeps.

A prompt may be read in pieces, the last of them one token long, or be given anew with its answer in every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn

_METHODS = ("_prefill", "generate")


@dataclass
class Generation:
    """A run of generate().

    Attributes:
        run: Number of the run, from 1; 0 where nothing is generated.
        prompt: Tokens of its prompt, padding included; 0 as long as it is not known.
        prefilling: Whether the prompt is being read.
        beams: Beams that are kept of each prompt; their cached tokens change places.
    """

    run: int = 0
    prompt: int = 0
    prefilling: bool = False
    beams: int = 1


@dataclass
class _Wire:
    """The methods in place of a model's own, and who listens to them."""

    listeners: list[Generation] = field(default_factory=list)
    runs: int = 0

    def tell(self, **parts: Any) -> None:
        for listener in self.listeners:
            for name, value in parts.items():
                setattr(listener, name, value)


@contextmanager
def listening(module: nn.Module) -> Iterator[Generation]:
    """What a module's generate() is about, kept up to date; nothing stays on the module when the last one leaves."""
    found = Generation()
    if not all(hasattr(module, name) for name in _METHODS):
        yield found
        return
    wire = getattr(vars(module).get("_prefill"), "wire", None) or _wired(module)
    wire.listeners.append(found)
    try:
        yield found
    finally:
        # By identity: two that heard the same are equal.
        wire.listeners[:] = [other for other in wire.listeners if other is not found]
        if not wire.listeners:
            for name in _METHODS:
                delattr(module, name)


def _wired(module: Any) -> _Wire:
    wire, read, run = _Wire(), module._prefill, module.generate

    @wraps(read)
    def prefill(ids: Tensor, config: Any, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        parts = (ids, given.get("attention_mask"), given.get("inputs_embeds"))
        prompt = max(part.shape[1] for part in parts if isinstance(part, Tensor) and part.ndim > 1)
        wire.tell(prompt=prompt, prefilling=True, beams=int(getattr(config, "num_beams", None) or 1))
        try:
            return read(ids, config, given, *args, **kwargs)
        finally:
            wire.tell(prefilling=False)

    @wraps(run)
    def generate(*args: Any, **kwargs: Any) -> Any:
        wire.runs += 1
        wire.tell(run=wire.runs)
        try:
            return run(*args, **kwargs)
        finally:
            wire.tell(run=0, prompt=0, prefilling=False, beams=1)

    prefill.wire = wire  # type: ignore[attr-defined]
    module._prefill, module.generate = prefill, generate
    return wire
