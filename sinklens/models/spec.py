"""What the rest of the house knows about a model: its blocks and where things are, by role, not by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from .spread import Spread
    from .streaming import StreamedBlocks


@dataclass(frozen=True)
class Write:
    """A module whose output, times `scale`, is added to the residual stream.

    Attributes:
        copied: The block changes that output in place later on, so who wants it has to copy it.
    """

    path: str
    scale: float = 1.0
    copied: bool = False


@dataclass(frozen=True)
class Piece:
    """A module's output, or a part of its last axis: `all`, `first half`, `second half`, `even` or `odd`."""

    path: str
    part: str = "all"


@dataclass(frozen=True)
class FeedForward:
    """A dense feed-forward part from inside: `product = act(gate) * up`, or `act(up)` where there is no gate."""

    up: Piece
    act: str
    gate: Piece | None = None


@dataclass
class Sum:
    """How a block's residual stream comes about: after = before + attention + mlp.

    `before` is the block's input and `after` its output. Blocks that end with a LayerNorm are different: `after` is
    that norm's input, and `attention` is what the attention and the first LayerNorm together make of the input,
    because that norm rescales what came in.

    Attributes:
        checked: Whether a forward pass was searched for the writers.
        exact: Whether the sum was found to hold to rounding. If not, nobody can say what was added.
        error: The largest error of the sum, relative to the terms of each entry.
        attention: What the attention (or what stands in its place) adds; empty if it adds nothing.
        middle: Blocks that end with a LayerNorm: the module that makes the state between the two sublayers.
        mlp: What the feed-forward part adds: one module, or several beside each other.
        input_copied: The block changes its input in place.
        feed_forward: The dense feed-forward part from inside, None if it could not be told apart.
    """

    checked: bool = False
    exact: bool = False
    error: float | None = None
    attention: tuple[Write, ...] = ()
    middle: str | None = None
    mlp: tuple[Write, ...] = ()
    input_copied: bool = False
    feed_forward: FeedForward | None = None


@dataclass(frozen=True)
class Block:
    """One decoder or encoder layer. All names are module paths from the root of the model, or None if absent.

    Attributes:
        index: 0-based within its tower.
        attention: The module that calls the attention interface (BERT: `...attention.self`), or None
            for blocks without softmax attention.
        attention_output: The projection W_O that writes attention into the residual (`o_proj`, `c_proj`, ...).
        mlp: The feed-forward module if the block has one as a module (OPT and BERT have none).
        down_proj: The dense Linear or Conv1D whose output the feed-forward part writes.
        shared_down_proj: The same for shared experts of an MoE block (before any shared-expert gate).
        experts: The module holding fused expert weights (`mlp.experts`).
        router: The module that chooses experts.
        residual_norm: For post-LayerNorm blocks, the block's last LayerNorm: its *input* is the residual
            stream worth measuring. None when the block's output is the residual stream itself.
        norms: Role to module path; roles are `pre_attention, post_attention, pre_mlp, post_mlp`.
        sum: What the block adds to its input; filled in by `find_sums`, which runs the model.
        stream: Of states that are several streams, `[stream, batch, pos, dim]` (AltUp): the one that its attention
            and its feed-forward part read and write. It is the residual stream that is measured.
    """

    index: int
    path: str
    attention: str | None = None
    attention_output: str | None = None
    mlp: str | None = None
    down_proj: str | None = None
    shared_down_proj: str | None = None
    experts: str | None = None
    router: str | None = None
    residual_norm: str | None = None
    norms: dict[str, str] = field(default_factory=dict)
    sum: Sum = field(default_factory=Sum, compare=False)
    stream: int | None = None

    def residual(self, state: Tensor) -> Tensor:
        """The residual stream in a state that the block is given or puts out."""
        return state if self.stream is None or state.ndim < 4 else state[self.stream]


@dataclass(frozen=True)
class Tower:
    """A stack of blocks that share a width: the language model, or a vision encoder.

    Attributes:
        name: `text` or `vision`.
        embedding: Path of the token embedding (text), or None.
        final_norm: Path of the norm after the last block, or None.
        n_experts: Routed experts per MoE block, 0 for a dense tower. Blocks of the few families that do not
            fuse their expert weights have `experts=None` although this is not 0.
        top_k: Experts per token, 0 for a dense tower.
        routed: Whether this tower's attention goes through transformers' attention registry.
    """

    name: str
    blocks: tuple[Block, ...]
    hidden_size: int
    heads: int
    kv_heads: int
    causal: bool
    embedding: str | None = None
    final_norm: str | None = None
    n_experts: int = 0
    top_k: int = 0
    routed: bool = True


@dataclass(frozen=True)
class Anatomy:
    """The towers of a model. `family` is the config's `model_type`."""

    family: str
    towers: tuple[Tower, ...]
    routed: bool = True
    """Whether the attention of all towers goes through transformers' attention registry; not so BLOOM, Falcon."""
    skipped: tuple[str, ...] = ()
    """Stacks of blocks beside the towers that were found and could not be read, with the reason."""

    @property
    def main(self) -> Tower:
        """The tower that is profiled by default: text if there is one."""
        return next((tower for tower in self.towers if tower.name == "text"), self.towers[0])


@dataclass(frozen=True)
class ModelInfo:
    """The `model` object of the JSON document, and what a saved run remembers of its model."""

    id: str
    revision: str | None
    family: str
    layers: int
    heads: int
    kv_heads: int
    hidden_size: int
    experts: int
    dtype: str
    parameters: int = 0
    vocab_size: int = 0
    files_sha256: dict[str, str] = field(default_factory=dict)


@dataclass
class OpenedModel:
    """A model ready to be traced: in eval mode, with its tokenizer if it has one.

    Attributes:
        module: What runs. Paths of the anatomy lead to its parts.
        backend: Name of the library that runs it (`sinklens ls backends`).
        handle: What that library holds it by; None for plain transformers models.
        twin: The same weights in a plain transformers model, where the library has changed `module`.
        processor: What turns pictures and text into inputs, if it was given.
        load_processor: Loads the one that came with the checkpoint; see `models.processors.processor_of`.
        blocks: What loads the main tower's blocks when they run; None where all weights are in memory.
        dequantised: The format that the weights were stored in and dequantised from; None for all others.
        spread: The processes that hold the model together under a tensor-parallel plan; None where one holds it all.
    """

    module: nn.Module
    tokenizer: object | None
    anatomy: Anatomy
    info: ModelInfo
    default_prompts: str | None = None
    """Prompts that came with the checkpoint (a JSONL path), used when the user gives none."""
    backend: str = "hf"
    handle: Any = None
    twin: nn.Module | None = None
    processor: Any = None
    load_processor: Callable[[], Any] | None = None
    blocks: StreamedBlocks | None = None
    dequantised: str | None = None
    spread: Spread | None = None

    @property
    def plain(self) -> nn.Module:
        """The model as transformers made it."""
        return self.module if self.twin is None else self.twin
