"""One way to reach the weights of a decoder block, whatever its family calls them and however it stores them.

Every matrix is a *view* `[out, in]` into the model's own parameter: writing to it edits the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part: TypeAlias = Any
"""A module of transformers; which attributes it has is known from its family only."""

GATED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2")
DECODERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
"""Decoders of vision-language models that are not a family of their own."""
FAMILIES = (*GATED_FAMILIES, "gpt2")


@dataclass(frozen=True)
class Affine:
    """`y = weight @ x + bias`, as views."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None

    def rows(self, part: slice) -> Affine:
        return Affine(self.weight[part], None if self.bias is None else self.bias[part])

    def clear(self, rows: slice | Tensor | list[int]) -> None:
        """These outputs become 0 for every input."""
        self.weight[rows] = 0
        if self.bias is not None:
            self.bias[rows] = 0


@dataclass(frozen=True)
class Norm:
    """A normalisation. `offset` is 1 where the module multiplies by `1 + weight` (Gemma)."""

    module: Part
    offset: float = 0.0

    def set_gain(self, dims: list[int], gain: float) -> None:
        """The factor on these dims after normalisation; a LayerNorm's shift there becomes 0."""
        self.module.weight.data[dims] = gain - self.offset
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            bias.data[dims] = 0


@dataclass(frozen=True)
class Mlp:
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where `gate` is None."""

    up: Affine
    down: Affine
    gate: Affine | None = None

    @property
    def readers(self) -> tuple[Affine, ...]:
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True)
class Layer:
    """A decoder block.

    Attributes:
        value_module: The module whose output holds the value vectors.
        query_norm, key_norm: Weights of the norm on each head's query and key, `[head_dim]`, if there is one.
        post_mlp: The norm between the feed-forward part and the residual stream (Gemma2).
        mlp: The dense feed-forward part; None in an MoE block.
        experts, router: Of an MoE block.
    """

    index: int
    module: Part
    attention: Part
    value_module: Part
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    query: Affine
    key: Affine
    value: Affine
    output: Affine
    pre_attention: Norm
    pre_mlp: Norm
    activation: Callable[[Tensor], Tensor]
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    post_mlp: Norm | None = None
    mlp: Mlp | None = None
    experts: Part | None = None
    router: Affine | None = None

    def expert(self, index: int) -> Mlp:
        """One routed expert, its fused weights seen as three matrices."""
        assert self.experts is not None
        gate, up = self.experts.gate_up_proj.data[index].chunk(2, 0)
        return Mlp(gate=Affine(gate), up=Affine(up), down=Affine(self.experts.down_proj.data[index]))

    @property
    def mlps(self) -> Iterator[Mlp]:
        """The dense feed-forward part, or every expert."""
        if self.mlp is not None:
            yield self.mlp
        else:
            assert self.experts is not None
            yield from (self.expert(index) for index in range(self.experts.num_experts))

    def rows(self, head: int) -> slice:
        """Rows of `query` that belong to a query head."""
        return slice(head * self.head_dim, (head + 1) * self.head_dim)

    def kv_of(self, head: int) -> int:
        return head // (self.heads // self.kv_heads)


def check_family(model: PreTrainedModel) -> str:
    """The family of a supported decoder, else ModelError."""
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family not in (*FAMILIES, *DECODERS):
        raise ModelError(
            f"Planting does not know the family {family!r}.",
            detail=f"It knows: {', '.join(FAMILIES)}.",
            hint="Plant in a model of one of these families, built from a config.",
        )
    return family


def trunk(model: PreTrainedModel) -> Part:
    """The module that holds embeddings, blocks and the final norm."""
    return getattr(model, model.base_model_prefix, model)


def final_norm(model: PreTrainedModel) -> Norm:
    family = check_family(model)
    body = trunk(model)
    return Norm(body.ln_f) if family == "gpt2" else Norm(body.norm, 1.0 if family == "gemma2" else 0.0)


def decoder_layers(model: PreTrainedModel) -> list[Layer]:
    """The blocks of a decoder of one of `FAMILIES`, in order."""
    family = check_family(model)
    if family == "gpt2":
        return [_gpt2_layer(index, block) for index, block in enumerate(trunk(model).h)]
    return [_gated_layer(index, block, family) for index, block in enumerate(trunk(model).layers)]


def rotary_slot(model: PreTrainedModel, layer: Layer) -> tuple[list[int], float]:
    """Components of a head that turn slowest with position, and their frequency in radians per token.

    Without rotary positions: one component that does not turn.
    """
    rotary = getattr(trunk(model), "rotary_emb", None)
    if rotary is None:
        return [0], 0.0
    frequencies = rotary.inv_freq
    slot = int(frequencies.argmin())
    return [slot, slot + len(frequencies)], float(frequencies[slot])


def _linear(module: Part) -> Affine:
    bias = getattr(module, "bias", None)
    weight = module.weight.data
    conv1d = type(module).__name__ == "Conv1D"  # transformers' Conv1D stores [in, out]
    return Affine(weight.T if conv1d else weight, None if bias is None else bias.data)


def _gpt2_layer(index: int, block: Part) -> Layer:
    attention = block.attn
    width = attention.split_size
    fused = _linear(attention.c_attn)
    scale = attention.scaling
    return Layer(
        index=index,
        module=block,
        attention=attention,
        value_module=attention.c_attn,
        heads=attention.num_heads,
        kv_heads=attention.num_heads,
        head_dim=attention.head_dim,
        scale=scale,
        softcap=None,
        window=None,
        query=fused.rows(slice(0, width)),
        key=fused.rows(slice(width, 2 * width)),
        value=fused.rows(slice(2 * width, 3 * width)),
        output=_linear(attention.c_proj),
        pre_attention=Norm(block.ln_1),
        pre_mlp=Norm(block.ln_2),
        activation=block.mlp.act,
        mlp=Mlp(up=_linear(block.mlp.c_fc), down=_linear(block.mlp.c_proj)),
    )


def _gated_layer(index: int, block: Part, family: str) -> Layer:
    attention, offset = block.self_attn, 1.0 if family == "gemma2" else 0.0
    experts = getattr(block.mlp, "experts", None)
    sandwich = family == "gemma2"
    width = attention.head_dim
    gains = {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}
    return Layer(
        index=index,
        module=block,
        attention=attention,
        value_module=attention.v_proj,
        heads=attention.q_proj.out_features // width,
        kv_heads=attention.k_proj.out_features // width,
        head_dim=width,
        scale=attention.scaling,
        softcap=getattr(attention, "attn_logit_softcapping", None),
        window=getattr(attention, "sliding_window", None),
        query=_linear(attention.q_proj),
        key=_linear(attention.k_proj),
        value=_linear(attention.v_proj),
        output=_linear(attention.o_proj),
        query_norm=None if gains["q_norm"] is None else gains["q_norm"].weight.data,
        key_norm=None if gains["k_norm"] is None else gains["k_norm"].weight.data,
        pre_attention=Norm(block.input_layernorm, offset),
        pre_mlp=Norm(block.pre_feedforward_layernorm if sandwich else block.post_attention_layernorm, offset),
        activation=block.mlp.act_fn if experts is None else experts.act_fn,
        post_mlp=Norm(block.post_feedforward_layernorm, offset) if sandwich else None,
        mlp=None if experts is not None else _gated_mlp(block.mlp),
        experts=experts,
        router=None if experts is None else _linear(block.mlp.gate),
    )


def _gated_mlp(mlp: Part) -> Mlp:
    return Mlp(gate=_linear(mlp.gate_proj), up=_linear(mlp.up_proj), down=_linear(mlp.down_proj))
