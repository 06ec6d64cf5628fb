"""A vector per head that is added to what the head writes: a V bias, which moves no attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.papers import WHEN_SINKS_EMERGE
from sinklens.kernels.transfer import Transferred
from sinklens.models.spec import Tower

from .attention_method import AttentionMethod
from .kv_bias import Vectors, of_heads
from .method import registry
from .seen import Seen
from .tables import fits, nested


@registry.register("value-bias")
@dataclass(frozen=True, kw_only=True)
class ValueBias(AttentionMethod):
    """Adds a vector of its own to what every head writes: the part of a KV bias that is no place to attend to.

    How it is computed: in every real row of the chosen heads the output of the head, before the output projection,
    becomes o + v'. No weight changes, so a trace sees the map of the model.

    Compared with the paper: Gu et al. train models with such a bias as a control: unlike a key bias it does not
    remove the sink. Here v' is given.

    When not to trust it: it is a control. An effect of a KV bias that this has too comes from what is written, and not
    from where attention goes.

    Args:
        value: v' as layers of heads of numbers; heads are those of values or of queries.
    """

    value: Vectors

    name = "value-bias"
    title = "Value bias"
    formula = (
        '<math display="block"><msup><mi>o</mi><mo>′</mo></msup><mo>=</mo><mi>o</mi><mo>+</mo><msup><mi>v</mi>'
        "<mo>′</mo></msup></math>"
    )
    reference = WHEN_SINKS_EMERGE.at("value biases, a control of key biases")
    tables = frozenset({"value"})
    moves = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "value", nested(self.name, "value", self.value, (3,)))

    @property
    def identity(self) -> bool:
        return not any(number for layer in self.value for head in layer for number in head)

    def check(self, tower: Tower) -> None:
        super().check(tower)
        fits(self.name, "value", self.value, tower, (tower.kv_heads or tower.heads, tower.heads))

    def edit(self, seen: Seen, output: Tensor, *, remember: bool) -> Transferred | None:
        if torch.is_grad_enabled() and output.requires_grad:
            raise UsageError(f"{self.name} has no gradient here.", hint="Run under torch.no_grad().")
        value = of_heads(self, "value", seen, output.shape[3])
        edited = seen.rows[:, :, None] & (seen.chosen & (value != 0).any(-1))
        wide = torch.promote_types(output.dtype, torch.float32)
        changed = (output.to(wide) + value.to(wide)).to(output.dtype)
        none = torch.zeros((), dtype=torch.int64, device=output.device)
        return Transferred(torch.where(edited[..., None], changed, output), edited.sum(), none.double(), none)
