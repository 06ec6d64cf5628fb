"""Reading a forward: order of use, branches by attributes, helper methods, sums and attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinklens.models.parts import attention_kind, expert_count, is_leaf, is_norm, linear_shape
from sinklens.models.reading import events


def trail(module: nn.Module) -> list[str]:
    return [event.path or event.kind for event in events(module, is_leaf)]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(5, 3)  # registered first, used last
        self.gate, self.up, self.act = nn.Linear(3, 5), nn.Linear(3, 5), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Choosy(nn.Module):
    def __init__(self, first: bool, extra: bool) -> None:
        super().__init__()
        self.first = first
        self.norm, self.part = nn.LayerNorm(3), Gated()
        self.extra = nn.Linear(3, 3) if extra else None

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        if self.first:
            x = self.norm(x)
        x = residual + self.helper(x)
        if not self.first:
            x = self.norm(x)
        if self.extra is not None:
            x = self.extra(x)
        return x

    def helper(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_arguments_come_before_the_call() -> None:
    assert trail(Gated()) == ["gate", "act", "up", "down"]


def test_branches_follow_the_attributes_and_helpers_are_read() -> None:
    part = ["part.gate", "part.act", "part.up", "part.down"]
    assert trail(Choosy(True, extra=False)) == ["norm", *part, "add"]
    assert trail(Choosy(False, extra=False)) == [*part, "add", "norm"]
    assert trail(Choosy(False, extra=True)) == [*part, "add", "norm", "extra"]


class Mentioning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.a is not None and self.a.bias is not None:
            x = self.b(x)
        return x.to(self.a.weight.dtype)


def test_asking_about_a_part_is_not_using_it() -> None:
    assert trail(Mentioning()) == ["b"]


class Undecided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, flag: bool = True) -> Any:
        x = self.a(x) if flag else self.b(x)
        return (x,) + (F.softmax(x, dim=-1),)  # noqa: RUF005  joining tuples is no sum


def test_a_branch_on_inputs_is_read_on_both_sides_and_tuples_are_not_sums() -> None:
    assert trail(Undecided()) == ["a", "b", "attend"]


def test_without_source_the_order_of_registration_is_used() -> None:
    scope: dict[str, Any] = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return self.b(self.a(x))", scope)
    made = scope["Made"]()
    made.a, made.b = nn.Linear(3, 5), nn.Linear(5, 3)
    assert trail(made) == ["a", "b"]


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x)

    def again(self, x: Tensor) -> Tensor:
        return self.again(self.a(x))


def test_recursion_ends() -> None:
    assert trail(Recursive()) == ["a"]


def test_parts_are_judged_by_what_they_own() -> None:
    from transformers.pytorch_utils import Conv1D

    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(Conv1D(5, 3)) == (3, 5)
    assert linear_shape(nn.Embedding(3, 5)) is None
    assert is_norm(nn.LayerNorm(3))
    assert not is_norm(nn.Linear(3, 3))
    scale = nn.Module()
    scale.register_parameter("lambda1", nn.Parameter(torch.ones(3)))
    assert not is_norm(scale)


def test_experts_own_nothing_that_is_not_per_expert() -> None:
    experts = nn.Module()
    experts.register_parameter("up", nn.Parameter(torch.zeros(7, 5, 3)))
    assert expert_count(experts) == 0
    experts.register_parameter("down", nn.Parameter(torch.zeros(7, 3, 5)))
    assert expert_count(experts) == 7
    experts.register_parameter("bias", nn.Parameter(torch.zeros(7, 3)))
    assert expert_count(experts) == 7
    experts.register_parameter("decay", nn.Parameter(torch.zeros(3)))
    assert expert_count(experts) == 0


def test_a_router_is_no_attention_and_cross_attention_is_not_self_attention() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.map(x), dim=-1)

    class CrossAttention(Router):
        num_heads = 2

    class Attention(Router):
        num_heads = 2

    assert attention_kind(Router()) is None
    assert attention_kind(CrossAttention()) is None
    assert attention_kind(Attention()) == "softmax"
