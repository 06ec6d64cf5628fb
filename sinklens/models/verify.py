"""Tests what was read about a model by running it: order, widths, causes, norm roles, direction of attention.

`find_anatomy` is a hypothesis. Here each claim meets an experiment that would fail if the claim were wrong. Noise
is added to a part that is said to write into a block's residual stream, and the block's output has to move by that
noise. A causal tower must not look at a changed last token, a bidirectional one must.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .spec import Anatomy, Block, Tower
from .sums import find_sums
from .watched import FEEDERS, Seen, feed_forward_of, first_of, input_of, norms_of, observe

WRITERS = ("attention_output", *FEEDERS)
CAUSAL_LIMIT = 1e-6
"""Relative change of earlier rows. Masked keys have weight exactly 0, so exact kernels give 0."""
WRITES_LIMIT = 0.3
"""Agreement of noise and effect; a writer behind a norm or a gate gives less than 1, unrelated directions 0."""


class AnatomyCheck(NamedTuple):
    """One experiment: what was measured, against which limit, and what it says."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    detail: str


@torch.no_grad()
def verify_anatomy(model: nn.Module, anatomy: Anatomy, run: Callable[[], Any]) -> list[AnatomyCheck]:
    """Runs the model once, and up to six times more per tower; fills in the norm roles and sums of `anatomy`.

    Args:
        run: Runs one forward pass of `model`, the same each time, on two or more tokens. Rows may be padded, but
            not the first (fully masked rows of some families look at every key).

    Returns:
        Checks for every tower that `run` reaches; the main tower must be reached. Nothing stays on the model.
    """
    checks: list[AnatomyCheck] = []
    seen = observe(model, anatomy, run)
    for tower in anatomy.towers:
        reached = any(block.path in seen.order for block in tower.blocks)
        if not reached and tower is not anatomy.main:
            continue
        order = _order(tower, seen)
        checks.append(order)
        if not order.passed:
            continue
        checks.append(_width(tower, seen))
        checks += [check for role in WRITERS if (check := _writes(model, tower, role, seen, run))]
        checks += [_norm_roles(model, tower, seen), _residual(model, tower, seen)]
        checks += [check for check in [_direction(model, tower, seen, run)] if check]
        find_sums(model, tower, run)
        checks.append(_sums(tower))
    return checks


def _replaced(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _order(tower: Tower, seen: Seen) -> AnatomyCheck:
    expected = [block.path for block in tower.blocks]
    ran = [path for path in seen.order if path in set(expected)]
    wrong = next(
        (i for i, (a, b) in enumerate(zip(ran, expected, strict=False)) if a != b),
        min(len(ran), len(expected)),
    )
    detail = f"all {len(expected)} blocks ran once, in order"
    if ran != expected:
        detail = f"{len(ran)} block calls for {len(expected)} blocks, first difference at call {wrong}"
    return AnatomyCheck(
        f"{tower.name}: blocks run in order", ran == expected, len(ran), len(expected), detail
    )


def _width(tower: Tower, seen: Seen) -> AnatomyCheck:
    widths = {seen.values[block.path][1].shape[-1] for block in tower.blocks}
    return AnatomyCheck(
        f"{tower.name}: residual width",
        widths == {tower.hidden_size},
        max(widths),
        tower.hidden_size,
        f"block outputs have width {', '.join(map(str, sorted(widths)))}",
    )


@dataclass
class _Nudged:
    """One block on the input it had, with noise added to one part: does the block's output move by that noise?

    Noise of the size of a typical row is used and not silence, because what a dormant layer writes may be
    smaller than the rounding of a bfloat16 residual stream.
    """

    block: Block
    part: str
    seen: Seen
    noise: Tensor | None = None
    agreement: float = 0.0

    def restore(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_input(args, kwargs, self.seen.values[self.block.path][0])

    def nudge(self, _: nn.Module, args: Any, output: Any) -> Any:
        made: Tensor = first_of(output)
        rows = self.seen.values[self.block.path][1].float().square().mean(-1).sqrt()
        noise = torch.randn(made.shape, generator=torch.Generator().manual_seed(self.block.index))
        self.noise = noise.to(made.device) * rows.median()
        return _replaced(output, made + self.noise.to(made.dtype))

    def before_norm(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Post-LayerNorm blocks are compared before their last norm, where the sum is still a sum."""
        self.measure(self.seen.values[self.block.residual_norm or ""][0], input_of(args, kwargs))

    def after_block(self, _: nn.Module, args: Any, output: Any) -> Any:
        usual = self.seen.values[self.block.path][1]
        if self.block.residual_norm is None:
            self.measure(usual, first_of(output))
        return _replaced(output, usual)

    def measure(self, usual: Tensor, now: Tensor | None) -> None:
        if now is None or self.noise is None:
            return
        usual, now = self.block.residual(usual), self.block.residual(now)
        if self.noise.numel() != now.numel():
            return
        moved, noise = (now.float() - usual.float()).flatten(), self.noise.flatten()
        cosine = float(nn.functional.cosine_similarity(moved, noise, dim=0))
        # Behind a norm that blows one dim up (massive activations under Gemma's norms) that dim is all a cosine
        # sees; the signs of the others still follow the noise.
        signs = float((moved.sign() * noise.sign()).mean())
        self.agreement = max(cosine, signs)

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        module = model.get_submodule(self.block.path)
        stack.callback(module.register_forward_pre_hook(self.restore, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(self.after_block).remove)
        stack.callback(model.get_submodule(self.part).register_forward_hook(self.nudge).remove)
        if self.block.residual_norm is not None:
            norm = model.get_submodule(self.block.residual_norm)
            stack.callback(norm.register_forward_pre_hook(self.before_norm, with_kwargs=True).remove)


def _writes(
    model: nn.Module, tower: Tower, role: str, seen: Seen, run: Callable[[], Any]
) -> AnatomyCheck | None:
    """Adds noise to one role in every block at once, each block on the input it had, and looks at the outputs.

    A block's output has to move where the noise points. So it does behind a norm or a gate, but not if the part
    is a map further inside (a gate, a value projection) that was mistaken for the writer. The feed-forward part
    would answer to a changed attention, so it is held to what it wrote before.
    """
    tests = [_Nudged(block, part, seen) for block in tower.blocks if (part := getattr(block, role))]
    if not tests:
        return None

    def hold(part: str) -> Callable[..., Any]:
        return lambda _, args, output: _replaced(output, seen.values[part][1])

    held = [part for test in tests for name in FEEDERS if (part := getattr(test.block, name))]
    with ExitStack() as stack:
        for part in held if role == "attention_output" else []:
            stack.callback(model.get_submodule(part).register_forward_hook(hold(part)).remove)
        for test in tests:
            test.attach(model, stack)
        run()
    least = min(tests, key=lambda test: test.agreement)
    return AnatomyCheck(
        f"{tower.name}: {role} writes the residual stream",
        least.agreement > WRITES_LIMIT,
        least.agreement,
        WRITES_LIMIT,
        "agreement (cosine, or of signs) of noise added to it with the change of its block's output; least in block "
        f"{least.block.index}",
    )


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor) -> tuple[Any, Any]:
    """The call with its states replaced, wherever `input_of` found them."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return (*args[:i], tensor, *args[i + 1 :]), kwargs
    name = "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else None
    name = name or next(key for key, value in kwargs.items() if isinstance(value, Tensor))
    return args, {**kwargs, name: tensor}


def _norm_roles(model: nn.Module, tower: Tower, seen: Seen) -> AnatomyCheck:
    """Roles by identity of tensors: what a norm puts out is what the attention reads, and so on. Fills them in."""
    without = []
    for block in tower.blocks:
        found = _roles(model, block, seen)
        block.norms.clear()
        block.norms.update(found)
        if norms_of(model, block) and not found:
            without.append(block.index)
    names = sorted({role for block in tower.blocks for role in block.norms})
    return AnatomyCheck(
        f"{tower.name}: norm roles",
        not without,
        float(len(tower.blocks) - len(without)),
        float(len(tower.blocks)),
        f"found {', '.join(names) or 'none'}" + (f"; none in block {without[0]}" if without else ""),
    )


def _roles(model: nn.Module, block: Block, seen: Seen) -> dict[str, str]:
    roles: dict[str, str] = {}
    nothing = (None, None)
    attention = seen.identities.get(block.attention or "", nothing)
    parts = [seen.identities.get(name, nothing) for name in feed_forward_of(model, block)]
    ends = [part[1] for part in parts if block.mlp] or [
        seen.identities.get(block.down_proj or "", nothing)[1]
    ]
    for name in norms_of(model, block):
        read, made = seen.identities.get(name, nothing)
        if made and made == attention[0]:
            roles.setdefault("pre_attention", name)
        if made and made in [part[0] for part in parts]:
            roles.setdefault("pre_mlp", name)
        if read and read == attention[1]:
            roles.setdefault("post_attention", name)
        if read and read in ends:
            roles.setdefault("post_mlp", name)
    return roles


def _residual(model: nn.Module, tower: Tower, seen: Seen) -> AnatomyCheck:
    """A post-LayerNorm block returns what its last norm made; any other block does not return a norm's output."""
    wrong = []
    for block in tower.blocks:
        returned = seen.identities[block.path][1]
        makers = [
            name for name in norms_of(model, block) if seen.identities.get(name, (None, None))[1] == returned
        ]
        if makers != ([block.residual_norm] if block.residual_norm else []):
            wrong.append(block.index)
    post = tower.blocks[0].residual_norm is not None
    kind = "the input of the block's last norm (post-LayerNorm)" if post else "the block's output"
    return AnatomyCheck(
        f"{tower.name}: residual stream",
        not wrong,
        float(len(wrong)),
        0.0,
        f"it is {kind}" + (f"; not so in block {wrong[0]}" if wrong else ""),
    )


def _sums(tower: Tower) -> AnatomyCheck:
    """Whether attention and feed-forward part add up to what a block changes. Not a condition: where they do not,
    nothing is said about who wrote what, and everything else stands."""
    errors = [block.sum.error for block in tower.blocks if block.sum.error is not None]
    unknown = [block.index for block in tower.blocks if not block.sum.exact]
    name = "input + attention + feed-forward part = output"
    return AnatomyCheck(
        f"{tower.name}: {name}" + (f", not found in blocks {unknown}" if unknown else ""),
        True,
        max(errors, default=None),
        None,
        "largest error of the sum, relative to the terms of an entry",
    )


def _direction(model: nn.Module, tower: Tower, seen: Seen, run: Callable[[], Any]) -> AnatomyCheck | None:
    """Changes the last position at the first attention's block; earlier rows may notice only without a causal mask."""
    block = next((block for block in tower.blocks if block.attention), None)
    if block is None or block.attention is None:
        return None
    given, usual = seen.values[block.path][0], seen.values[block.attention][1]
    if given.ndim != 3 or given.shape[1] < 2 or usual.shape[:2] != given.shape[:2]:
        return None  # packed patches have no batch axis
    noise = torch.randn(given.shape[-1], generator=torch.Generator().manual_seed(0))
    changed = given.clone()
    changed[:, -1] += (3 * given.float().std().cpu() * noise).to(given.device, given.dtype)
    measured: list[float] = []

    def hook(_: nn.Module, args: Any, output: Any) -> None:
        made = first_of(output)
        measured.append(float((made - usual)[0, :-1].abs().max() / usual[0].abs().max().clamp_min(1e-30)))

    def put(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_input(args, kwargs, changed)

    with ExitStack() as stack:
        stack.callback(
            model.get_submodule(block.path).register_forward_pre_hook(put, with_kwargs=True).remove
        )
        stack.callback(model.get_submodule(block.attention).register_forward_hook(hook).remove)
        run()
    value = max(measured, default=0.0)
    looks_ahead = value > CAUSAL_LIMIT
    return AnatomyCheck(
        f"{tower.name}: attention is {'causal' if tower.causal else 'bidirectional'}",
        looks_ahead != tower.causal,
        value,
        CAUSAL_LIMIT,
        "relative change of earlier rows when the last position changes",
    )
