"""One forward pass worth of prompts, and which of its tokens are real."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel

_running: ContextVar[Batch | None] = ContextVar("running batch", default=None)


@dataclass(frozen=True)
class Batch:
    """Model inputs and the mask of real tokens.

    Attributes:
        inputs: Keyword arguments of the model's forward.
        valid: True at real tokens. None means every token of every tower is real (images).
        prompts: The prompts in batch order; empty when the caller made the inputs.
    """

    inputs: dict[str, Any]
    valid: Bool[Tensor, "batch pos"] | None
    prompts: tuple[Prompt, ...] = ()

    @property
    def size(self) -> int:
        return int(next(v for v in self.inputs.values() if isinstance(v, Tensor)).shape[0])


def collate(
    prompts: Sequence[Prompt],
    *,
    pad_id: int = 0,
    side: Literal["left", "right"] = "right",
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad prompts to one length. Right padding keeps the positions of causal models as they are without padding.

    Prompts with pictures go alone: what the processor made of one fits no other.
    """
    if any(prompt.visual is not None for prompt in prompts):
        return _alone(prompts, device)
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    valid = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt) if side == "left" else 0
        ids[row, start : start + len(prompt)] = torch.tensor(prompt.token_ids)
        valid[row, start : start + len(prompt)] = True
    inputs: dict[str, Any] = {"input_ids": ids.to(device)}
    if not bool(valid.all()):
        inputs["attention_mask"] = valid.long().to(device)
        if side == "left":
            inputs["position_ids"] = (valid.long().cumsum(-1) - 1).clamp(min=0).to(device)
    return Batch(inputs, valid.to(device), tuple(prompts))


def _alone(prompts: Sequence[Prompt], device: torch.device | str) -> Batch:
    (prompt,) = prompts
    assert prompt.visual is not None
    ids = torch.tensor([prompt.token_ids], device=device)
    inputs = {name: value.to(device) for name, value in prompt.visual.inputs.items()}
    return Batch({"input_ids": ids, **inputs}, torch.ones_like(ids, dtype=torch.bool), (prompt,))


def shortened(batch: Batch, length: int = 12) -> Batch:
    """The first real tokens of the longest prompt of a batch; batches that are not text alone stay as they are."""
    ids = batch.inputs.get("input_ids")
    others = batch.inputs.keys() - {"input_ids", "attention_mask", "position_ids"}
    if not isinstance(ids, Tensor) or others:
        return batch
    valid = batch.valid if batch.valid is not None else torch.ones_like(ids, dtype=torch.bool)
    row = int(valid.sum(-1).argmax())
    kept = ids[row][valid[row]][:length][None]
    return Batch({"input_ids": kept}, torch.ones_like(kept, dtype=torch.bool))


def forward(model: nn.Module, batch: Batch, *, logits: bool = True) -> Any:
    """Run the model on a batch without gradients or cache.

    Args:
        logits: With False, heads that can are asked for the last position only; no signal needs logits, and a
            large vocabulary makes them the largest tensor of the pass.
    """
    with under_way(batch), torch.no_grad():
        return model(**forward_inputs(model, batch, logits=logits))


@contextmanager
def under_way(batch: Batch) -> Iterator[None]:
    """Name the batch whose pass runs inside: some mitigations read the pictures of its prompts."""
    token = _running.set(batch)
    try:
        yield
    finally:
        _running.reset(token)


def forward_inputs(model: nn.Module, batch: Batch, *, logits: bool = True) -> dict[str, Any]:
    """The keyword arguments of that forward pass."""
    # The class's own: a library may have put something in the place of an instance's forward.
    accepted = inspect.signature(type(model).forward).parameters
    inputs = {k: v for k, v in batch.inputs.items() if k in accepted or k not in ("position_ids",)}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if not logits and "logits_to_keep" in accepted and not _slices_states(model):
        inputs["logits_to_keep"] = 1
    return inputs


def _slices_states(model: nn.Module) -> bool:
    """Whether a part without a head is told how many logits to keep: then states of late blocks are left out, too."""
    parts = (part for part in model.modules() if part is not model and hasattr(part, "get_output_embeddings"))
    return any(
        "logits_to_keep" in inspect.signature(type(part).forward).parameters
        and part.get_output_embeddings() is None  # pyright: ignore[reportCallIssue]
        for part in parts
    )


def device_of(opened: OpenedModel) -> torch.device:
    """Where inputs of the model belong; the CPU for a model whose weights are elsewhere."""
    device = next(opened.module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def running() -> Batch | None:
    """The batch of the forward pass that is under way, if it is one of this project's own."""
    return _running.get()


def first_tensor(output: Any) -> Tensor:
    """The main result of a forward pass: logits if there are any, else the last hidden state."""
    for name in ("logits", "last_hidden_state", "logits_per_image", "image_embeds", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Tensor):
        return output
    return next(value for value in output.values() if isinstance(value, Tensor))


def text_config(model: nn.Module) -> Any:
    """The config of the language model; in models with several towers it is a part of the whole."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
