"""A key and a value per head that stand before all tokens: a KV bias, or with no value a K bias."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.papers import MASSIVE_ACTIVATIONS
from sinklens.models.spec import Tower

from .beside_keys import BesideKeys
from .method import registry
from .seen import Seen
from .tables import fits, nested, shape_of

Vectors = Collection[Collection[Collection[float]]]


@registry.register("kv-bias")
@dataclass(frozen=True, kw_only=True)
class KVBias(BesideKeys):
    """Gives every head a key and a value of its own before all tokens, as models trained with an attention bias have.

    How it is computed: with the key k' and the value v' of a head the softmax is over q·k' and all q·k, scaled (and
    capped) alike, and the output is the weighted sum of v' and all values. From the row's log-sum-exp, the mass on
    the bias is m = exp(q·k') / (exp(q·k') + sum_j exp(z_j)) and the output (1 - m) o + m v'. Without `value` v' is 0
    (a K bias, which is a denominator of its own for every query). k' meets the query as attention has it: after RoPE,
    k' itself is not rotated. The bias is seen by every real row, also outside of a sliding window, and a trace
    records m as the mass on a learned sink. With `replaces` the keys of some tokens are hidden from other rows;
    `kv_bias_for` makes a bias of a first token that way.

    Compared with the paper: Sun et al. train GPT-2 with such a bias and find that its massive activations are gone;
    Gu et al. find the same of the sink, also with v' = 0. Both train k' and v'; here they are given, or read off
    a token. A trained bias belongs to the model that was trained with it. In grouped-query attention a bias per key
    head serves its whole group, one per query head serves each alone.

    When not to trust it: on a model trained without it, a bias that is not read off the model is a change of every row
    it was not trained for. One key for all positions is exact only where the token's key is the same in every prompt,
    as that of a token that always comes first. As k' is not rotated, it meets absolute positions: a left-padded batch
    needs position_ids that count real tokens, which generate() and traces give.

    Args:
        key: k' as layers of heads of numbers; heads are those of keys or of queries.
        value: v' likewise; None for 0.
    """

    key: Vectors
    value: Vectors | None = None

    name = "kv-bias"
    title = "Key and value bias"
    formula = (
        '<math display="block"><mi>o</mi><mo>=</mo><mi>softmax</mi><mo>(</mo><mfrac><mrow><mo>[</mo><mi>q</mi>'
        "<msup><mi>k</mi><mo>′</mo></msup><mo>;</mo><mi>q</mi><msup><mi>K</mi><mi>T</mi></msup><mo>]</mo></mrow>"
        "<msqrt><mi>d</mi></msqrt></mfrac><mo>)</mo><mo>[</mo><msup><mi>v</mi><mo>′</mo></msup><mo>;</mo><mi>V</mi>"
        "<mo>]</mo></math>"
    )
    reference = MASSIVE_ACTIVATIONS.at("explicit attention biases")
    tables = frozenset({"key", "value"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key", "value"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, nested(self.name, name, given, (3,)))

    def check(self, tower: Tower) -> None:
        super().check(tower)
        for name in ("key", "value"):
            value = getattr(self, name)
            if value is not None:
                fits(self.name, name, value, tower, (tower.kv_heads or tower.heads, tower.heads))

    def place(self, seen: Seen) -> Float[Tensor, "#batch #head #query"]:
        query = seen.call.query
        key = of_heads(self, "key", seen, query.shape[3]).to(torch.promote_types(query.dtype, torch.float32))
        logit = (query.to(key.dtype) * key[None, :, None]).sum(-1) * seen.call.scale
        cap = seen.call.softcap
        return logit if cap is None else cap * torch.tanh(logit / cap)

    def written(self, seen: Seen) -> Float[Tensor, "head value_dim"] | None:
        return None if self.value is None else of_heads(self, "value", seen, seen.call.value.shape[3])


def of_heads(method: Any, name: str, seen: Seen, width: int) -> Float[Tensor, "head dim"]:
    """Vectors of a layer, one per query head.

    Raises:
        UsageError: They are not as wide as the heads of the model.
    """
    table = getattr(method, name)
    found = shape_of(table)[2]
    if found != width:
        raise UsageError(
            f"{method.name}: {name} has {found} numbers per head, and layer {seen.site.layer} has {width}."
        )
    notes = seen.memory
    if name not in notes:
        vectors = torch.tensor(table[seen.site.layer], dtype=torch.float64, device=seen.call.query.device)
        notes[name] = vectors.repeat_interleave(seen.call.query.shape[1] // len(vectors), 0)
    return notes[name]
