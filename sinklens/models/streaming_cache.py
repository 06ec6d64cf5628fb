"""A cache of bounded size for endless text: the first tokens and the last ones, at positions within the cache.

After StreamingLLM (Xiao et al., arXiv 2309.17453).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.core.errors import DataError, ModelError, UsageError

from .anatomy import find_anatomy
from .spec import OpenedModel

Keys = Float[Tensor, "batch kv_head token width"]


@dataclass
class Rotations:
    """The rotary positions of a model, turned forwards and back by the model's own function."""

    module: nn.Module
    turn: Callable[..., tuple[Tensor, Tensor]]
    scaling: float
    base: int = 0
    """Position of the first token of the cache. Only differences count; the check of a model moves it."""

    def turned(self, keys: Keys, first: int, *, back: bool = False) -> Keys:
        """Keys of consecutive positions from `first` on, turned to them, or back from them."""
        places = torch.arange(keys.shape[2], device=keys.device)[None] + first + self.base
        cos, sin = self.module.forward(keys.float(), places)
        if back:
            cos, sin = cos / self.scaling**2, -sin / self.scaling**2
        return self.turn(keys.float(), keys.float(), cos, sin)[1].to(keys.dtype)


@dataclass
class Streaming:
    """A cache while it is on a model.

    Attributes:
        past_key_values: To be passed to the model or to `generate()`.
        start: Tokens kept from the beginning.
        recent: Tokens kept from the end, those of the running pass included.
    """

    start: int
    recent: int
    original_positions: bool
    rotations: Rotations
    past_key_values: Any = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new text, with an empty cache."""
        from transformers.cache_utils import Cache

        layer: Any = partial(_layer_class(), self)
        self.past_key_values = Cache(layer_class_to_replicate=layer)

    def kept(self, held: int, coming: int) -> int:
        """How many of `held` tokens stay when `coming` more arrive.

        Raises:
            UsageError: The new tokens alone are more than `recent`.
        """
        if not held or held + coming <= self.start + self.recent:
            return held
        if coming > self.recent:
            raise UsageError(
                f"A pass of {coming} tokens does not fit into the {self.recent} recent tokens of the cache.",
                hint="Pass fewer tokens at a time; only the first pass may be longer.",
            )
        return min(held, self.start) + min(max(0, held - self.start), self.recent - coming)


@contextmanager
def streaming_cache(
    model: nn.Module | OpenedModel, *, start: int = 4, recent: int = 2000, original_positions: bool = False
) -> Iterator[Streaming]:
    """Let a model with rotary positions read on with the first `start` and the last `recent` tokens in its cache.

    Before a pass of n tokens that does not fit, the first `start` and the last `recent - n` stay. Keys are held
    without their rotation and turned to positions 0, 1, ... of the cache in every pass, and the last query stands at
    the last of them. The first pass is ordinary causal attention, however long. Batches must be without padding.

    Args:
        original_positions: The well-known wrong implementation, as a control: keys and queries keep the positions
            they have in the text, so that distances to the first tokens grow beyond all bounds.

    Example:
        >>> with streaming_cache(model, start=4, recent=508) as stream:
        ...     model.generate(**inputs, past_key_values=stream.past_key_values)

    Raises:
        ModelError: The model has no rotary positions, several kinds, or windows of its own.
        DataError: A pass with padding.
    """
    if start < 0 or recent < 1:
        raise UsageError(f"start must be at least 0 and recent at least 1, got {start} and {recent}.")
    module = model.module if isinstance(model, OpenedModel) else model
    stream = Streaming(start, recent, original_positions, _rotations(model, module))
    with ExitStack() as stack:
        stack.callback(
            stream.rotations.module.register_forward_pre_hook(_places(stream), with_kwargs=True).remove
        )
        stack.callback(module.register_forward_pre_hook(_fits(stream), with_kwargs=True).remove)
        _check(module, stream)
        yield stream


def _rotations(model: nn.Module | OpenedModel, module: nn.Module) -> Rotations:
    tower = (model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)).main
    config = module.config.get_text_config()  # type: ignore[operator,union-attr]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise _refused(module, "Some of its layers have a window or a state of their own.")
    root = module.get_submodule(".".join(tower.blocks[0].path.split(".")[:-2]))
    rotary = [part for name, part in root.named_children() if name.startswith("rotary_emb")]
    turn = getattr(sys.modules[type(root).__module__], "apply_rotary_pos_emb", None)
    if len(rotary) != 1 or turn is None:
        raise _refused(module, "It has no rotary positions, or more than one kind of them.")
    if getattr(rotary[0], "rope_type", "default") in ("dynamic", "longrope"):
        raise _refused(module, "Its rotary frequencies depend on the length of the text.")
    return Rotations(rotary[0], turn, float(getattr(rotary[0], "attention_scaling", 1.0)))


def _refused(module: nn.Module, why: str) -> ModelError:
    return ModelError(f"The streaming cache cannot be put on {type(module).__name__}.", detail=why)


def _places(stream: Streaming) -> Callable[..., Any]:
    """A hook that gives the tokens of a pass their positions in the cache."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places: Any = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        layers = stream.past_key_values.layers
        owner, held = (layers[0].stream, layers[0].held) if layers else (stream, 0)
        count = places.shape[-1]
        first = layers[0].seen if owner.original_positions and layers else owner.kept(held, count)
        new = torch.arange(count, device=places.device)[None] + first + stream.rotations.base
        return args[:1], {**kwargs, "position_ids": new.expand_as(places)}

    return hook


def _fits(stream: Streaming) -> Callable[..., None]:
    """A hook that refuses passes which the cache would read wrongly."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is not stream.past_key_values:
            raise UsageError(
                "The model was called without its streaming cache.",
                hint="Pass past_key_values=stream.past_key_values, or leave the with block.",
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(mask, Tensor) and (mask.ndim != 2 or not bool(mask.all())):
            raise DataError(
                "The streaming cache takes no padding, and no attention mask but one of ones.",
                detail="The tokens that are dropped are the same for the whole batch.",
                hint="Pass texts of one length, or one at a time.",
            )

    return hook


@torch.no_grad()
def _check(module: nn.Module, stream: Streaming) -> None:
    """Read a few tokens with the cache turned on by 37 positions in between; nothing may change."""
    device, config = next(module.parameters()).device, module.config.get_text_config()  # type: ignore[operator,union-attr]
    ids = (torch.arange(9, device=device) * 7 + 1)[None] % config.vocab_size
    probe = Streaming(16, 16, False, stream.rotations)
    original, stream.past_key_values = stream.past_key_values, probe.past_key_values
    wrong, stream.original_positions = stream.original_positions, False
    training = module.training
    module.eval()
    try:
        truth = module(ids, past_key_values=probe.past_key_values).logits[0, -1].float()
        probe.reset()
        stream.past_key_values = probe.past_key_values
        module(ids[:, :5], past_key_values=probe.past_key_values)
        stream.rotations.base = 37
        found = module(ids[:, 5:], past_key_values=probe.past_key_values).logits[0, -1].float()
    except (RuntimeError, TypeError, ValueError, AttributeError) as problem:
        raise _refused(module, f"Its keys cannot be turned: {problem}") from problem
    finally:
        stream.rotations.base = 0
        stream.past_key_values, stream.original_positions = original, wrong
        module.train(training)
    far = float((found - truth).abs().max() / truth.abs().max())
    exact = next(module.parameters()).dtype in (torch.float32, torch.float64)
    if not far < (1e-3 if exact else 5e-2):
        raise _refused(module, f"Turned keys do not give the same output (relative difference {far:.2g}).")


@cache
def _layer_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class StreamingLayer(DynamicLayer):
        """Keys (not rotated) and values of one layer."""

        is_croppable = False
        keys: Any
        values: Any

        def __init__(self, stream: Streaming) -> None:
            super().__init__()
            self.stream, self.seen = stream, 0

        @property
        def held(self) -> int:
            return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            stream, coming, held = self.stream, key_states.shape[2], self.held
            kept = stream.kept(held, coming)
            if not stream.original_positions:
                key_states = stream.rotations.turned(key_states, kept, back=True)
            start = min(stream.start, kept)
            parts = [slice(0, start), slice(held - (kept - start), held)]
            old = [(self.keys[:, :, part], self.values[:, :, part]) for part in parts] if held else []
            self.keys = torch.cat([*(keys for keys, _ in old), key_states], 2)
            self.values = torch.cat([*(values for _, values in old), value_states], 2)
            self.seen += coming
            keys = self.keys if stream.original_positions else stream.rotations.turned(self.keys, 0)
            return keys, self.values

        def get_seq_length(self) -> int:
            return self.seen

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            kept = self.stream.kept(self.held, query_length)
            return kept + query_length, self.seen - kept

        def reset(self) -> None:
            super().reset()
            self.keys = self.values = None
            self.is_initialized, self.seen = False, 0

    return StreamingLayer
