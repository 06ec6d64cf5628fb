"""What a block adds to its input, found by running: which outputs sum up to the change of the residual stream.

Norms after a sublayer, residual multipliers, parallel branches and routed experts all end in a sum. Every output of
the right shape that comes after the attention, or after the feed-forward part, is a candidate; the pair whose sum
equals output minus input, entry by entry and to rounding, is the answer. Where no pair does, nothing is claimed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .spec import Block, FeedForward, Piece, Sum, Tower, Write
from .spread import distributed, own_part

ROUNDINGS = 4
"""Roundings, in units of the dtype's epsilon, by which a sum may differ from its terms."""

SPLITS = ("all", "first half", "second half", "even", "odd")


@dataclass
class Call:
    """What one module of a block was given and made. `made` is a copy; `kept` is the tensor itself."""

    started: int
    given: Tensor | None
    finished: int = -1
    made: Tensor | None = None
    kept: Tensor | None = None


@dataclass
class Ran:
    """One block's pass: its input, its residual stream afterwards, and the calls of its modules by path."""

    before: Tensor | None = None
    before_kept: Tensor | None = None
    after: Tensor | None = None
    changed_input: bool = False
    changed: frozenset[str] = frozenset()
    calls: dict[str, Call] = field(default_factory=dict)
    clock: int = 0


@dataclass(frozen=True)
class Fit:
    """A candidate sum: paths within the block, their scales, and how far off it is."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    scales: tuple[float, ...]
    error: float

    @property
    def depth(self) -> tuple[int, int, str]:
        """Outer modules first, and among those the ones with the shortest path."""
        text = " ".join((*self.attention, *self.mlp))
        return text.count("."), len(text), text

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.attention, self.mlp


@torch.no_grad()
def find_sums(
    model: nn.Module, tower: Tower, run: Callable[[], Any], votes: Counter[Any] | None = None
) -> None:
    """Fills in `sum` of every block that `run` reaches. Nothing stays on the model.

    Args:
        run: Runs one forward pass; a dozen tokens are enough, and their states are copied.
        votes: For blocks that are looked at one after the other: what was found in the others so far.
    """
    with ExitStack() as stack:
        seen = {block.index: _watch(model, block, tower.hidden_size, stack) for block in tower.blocks}
        run()
    fits = {block.index: list(_fits(block, seen[block.index])) for block in tower.blocks}
    votes = Counter() if votes is None else votes
    votes.update(fit.names for found in fits.values() for fit in found)
    for block in tower.blocks:
        # Equal modules (an attention and its output projection) tie: the outermost one is taken everywhere.
        ranked = sorted(fits[block.index], key=lambda fit: (-votes[fit.names], fit.error, fit.depth))
        _fill(model, block, seen[block.index], ranked[0] if ranked else None)


def piece(output: Tensor, part: str) -> Tensor:
    """The part of the last axis that a `Piece` names."""
    half = output.shape[-1] // 2
    cuts = {
        "all": slice(None),
        "first half": slice(half),
        "second half": slice(half, None),
        "even": slice(0, None, 2),
        "odd": slice(1, None, 2),
    }
    return output[..., cuts[part]]


def states_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The states a module is given: the first tensor by position, `hidden_states`, or the first by name."""
    named = [kwargs.get("hidden_states"), *kwargs.values()]
    return next((value for value in [*args, *named] if isinstance(value, Tensor)), None)


def _watch(model: nn.Module, block: Block, hidden: int, stack: ExitStack) -> Ran:
    """Hooks that copy what the modules of a block make, as far as a sum or the feed-forward part may need it."""
    ran = Ran()
    widths = _widths(model, block, hidden)

    def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = states_of(args, kwargs)
        ran.calls.clear()
        if given is not None:
            given = block.residual(given)
            ran.before, ran.before_kept = given.clone(), given

    def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if block.residual_norm is None and isinstance(made, Tensor):
            ran.after = block.residual(made).clone()
        if ran.before is not None and ran.before_kept is not None:
            ran.changed_input = not torch.equal(ran.before, ran.before_kept)
        ran.changed = frozenset(
            name
            for name, call in ran.calls.items()
            if call.made is not None and call.kept is not None and not torch.equal(call.made, call.kept)
        )
        ran.before_kept = None
        for call in ran.calls.values():
            call.kept = None

    def normed(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = states_of(args, kwargs)
        ran.after = given.clone() if given is not None else None

    whole = model.get_submodule(block.path)
    stack.callback(whole.register_forward_pre_hook(begin, with_kwargs=True).remove)
    if block.residual_norm is not None:
        norm = model.get_submodule(block.residual_norm)
        stack.callback(norm.register_forward_pre_hook(normed, with_kwargs=True).remove)
    for name, module in whole.named_modules():
        if name and not (block.experts and f"{block.path}.{name}".startswith(f"{block.experts}.")):
            _watch_part(module, name, ran, widths, stack)
    # First of all hooks: others may edit what the block made.
    stack.callback(whole.register_forward_hook(end, with_kwargs=True, prepend=True).remove)
    return ran


def _widths(model: nn.Module, block: Block, hidden: int) -> frozenset[int]:
    """Last axes worth a copy: the residual stream's, and those inside the feed-forward part."""
    down = model.get_submodule(block.down_proj) if block.down_proj else None
    inner = getattr(down, "in_features", None) or getattr(down, "nx", None)
    if not isinstance(inner, int):
        return frozenset((hidden,))
    # Of a model that is spread over processes the share of this one: what holds for all neurons holds for some.
    weight = getattr(down, "weight", None)
    share = own_part(weight).shape[-1] if isinstance(weight, Tensor) and distributed(weight) else inner
    return frozenset((hidden, inner, 2 * inner, share, 2 * share))


def _watch_part(module: nn.Module, name: str, ran: Ran, widths: frozenset[int], stack: ExitStack) -> None:
    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = states_of(args, kwargs)
        fits = given is not None and given.is_floating_point() and given.shape[-1] in widths
        ran.calls[name] = Call(ran.clock, given.clone() if fits and given is not None else None)
        ran.clock += 1

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = ran.calls[name]
        call.finished, ran.clock = ran.clock, ran.clock + 1
        made = output[0] if isinstance(output, tuple) else output
        if isinstance(made, Tensor) and made.is_floating_point() and made.ndim and made.shape[-1] in widths:
            call.made, call.kept = made.clone(), made

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)


def _inside(name: str, part: str | None) -> bool:
    return part is not None and (name == part or name.startswith(f"{part}."))


def _candidates(block: Block, ran: Ran) -> tuple[list[str], list[str]]:
    """Modules, as paths within the block, that may write for the attention and for the feed-forward part."""
    assert ran.before is not None

    def local(path: str | None) -> str | None:
        return path.removeprefix(f"{block.path}.") if path else None

    shape = ran.before.shape
    made = {
        name: call
        for name, call in ran.calls.items()
        if call.made is not None
        and call.made.numel() == ran.before.numel()
        and call.made.shape[-1] == shape[-1]
    }
    feeders = [local(path) for path in (block.mlp, block.down_proj, block.shared_down_proj, block.experts)]
    ends = [ran.calls[name].finished for name in feeders[1:] if name in ran.calls]
    starts = [ran.calls[name].started for name in feeders if name in ran.calls]
    first_end, first_start = min(ends, default=ran.clock), min(starts, default=ran.clock)
    output = local(block.attention_output)
    attended = ran.calls[output].finished if output in ran.calls else -1
    # The projection and the modules around it (but not around the feed-forward part) come after its call ended.
    around = {name for name in made if output and _inside(output, name)}
    attention = [
        name
        for name, call in made.items()
        if name in around or (attended <= call.finished < first_start)
        if not any(_inside(name, part) or (part and _inside(part, name)) for part in feeders)
    ]
    mlp = [name for name, call in made.items() if call.finished >= first_end and name not in attention]
    return attention, mlp


def _fits(block: Block, ran: Ran) -> Iterator[Fit]:
    """The candidate sums of a block that hold."""
    if ran.before is None or ran.after is None or ran.after.numel() != ran.before.numel():
        return
    attention, mlp = _candidates(block, ran)
    limit = ROUNDINGS * torch.finfo(ran.after.dtype).eps
    pairs: list[tuple[str, ...]] = [(name,) for name in mlp] or [()]
    sets = [(a, m) for a, m in product([(name,) for name in attention] or [()], pairs)]
    found = [fit for a, m in sets if (fit := _fit(block, ran, a, m)).error <= limit]
    if not found and block.residual_norm is None:
        # Two feed-forward parts side by side, such as shared experts outside the mixture.
        triples = product([(name,) for name in attention] or [()], combinations(mlp, 2))
        found = [fit for a, m in triples if (fit := _fit(block, ran, a, m)).error <= limit]
    yield from found


def _fit(block: Block, ran: Ran, attention: tuple[str, ...], mlp: tuple[str, ...]) -> Fit:
    """The scales that make a candidate sum come closest, and the largest error relative to an entry's terms."""
    assert ran.before is not None
    assert ran.after is not None
    after, before = _flat(ran.after), _flat(ran.before)
    terms = [_flat(ran.calls[name].made) for name in (*attention, *mlp)]
    if block.residual_norm is not None:
        # The state in the middle takes the place of the input, as it is.
        before, terms = (terms[0], terms[1:]) if attention else (before, terms)
    size = after.abs() + before.abs() + sum((term.abs() for term in terms), torch.zeros_like(after))
    size = size.clamp_min(torch.finfo(ran.after.dtype).tiny)
    limit = ROUNDINGS * torch.finfo(ran.after.dtype).eps

    def error(by: list[float]) -> float:
        total = sum((scale * term for scale, term in zip(by, terms, strict=True)), before)
        return float(((after - total).abs() / size).max())

    scales = [1.0] * len(terms)
    worst = error(scales)
    if worst > limit:
        scales = _scales([term / size for term in terms], (after - before) / size)
        worst = error(scales)
    if block.residual_norm is not None and attention:
        scales = [1.0, *scales]
    return Fit(attention, mlp, tuple(scales), worst)


def _flat(tensor: Tensor | None) -> Float[Tensor, " entry"]:
    assert tensor is not None
    return tensor.detach().cpu().double().flatten()  # not every device has double precision


def _scales(terms: list[Tensor], target: Tensor) -> list[float]:
    """Least squares over all entries, each weighed by its own size; terms that are zero get the scale 1."""
    if not terms:
        return []
    matrix = torch.stack(terms, -1)
    live = matrix.abs().amax(0) > 0
    scales = torch.ones(len(terms), dtype=matrix.dtype)
    if bool(live.any()):
        solved = torch.linalg.lstsq(matrix[:, live], target[:, None], driver="gelsd").solution
        scales[live] = solved[:, 0]
    return scales.tolist()


def _fill(model: nn.Module, block: Block, ran: Ran, fit: Fit | None) -> None:
    block.sum.__dict__.update(Sum(checked=ran.before is not None).__dict__)
    if ran.before is None:
        return
    block.sum.feed_forward = _feed_forward(model, block, ran)
    block.sum.input_copied = ran.changed_input
    if fit is None:
        return
    count = len(fit.attention)

    def write(name: str, scale: float) -> Write:
        path = f"{block.path}.{name}"
        return Write(path, scale, name in ran.changed)

    block.sum.exact, block.sum.error = True, fit.error
    if block.residual_norm is not None and fit.attention:
        block.sum.middle = f"{block.path}.{fit.attention[0]}"
    else:
        block.sum.attention = tuple(
            write(name, scale) for name, scale in zip(fit.attention, fit.scales[:count], strict=True)
        )
    block.sum.mlp = tuple(write(name, scale) for name, scale in zip(fit.mlp, fit.scales[count:], strict=True))


def _feed_forward(model: nn.Module, block: Block, ran: Ran) -> FeedForward | None:
    """Which output is the gate and which goes up: the two whose combination is what the down projection reads."""
    if block.down_proj is None:
        return None
    down = ran.calls.get(block.down_proj.removeprefix(f"{block.path}."))
    if down is None or down.given is None:
        return None
    whole, inner = model.get_submodule(block.path), down.given.shape[-1]
    acts, pieces = [], []
    for name, call in ran.calls.items():
        if call.made is None or call.finished > down.started or _inside(name, block.attention):
            continue
        module = whole.get_submodule(name)
        if any(True for _ in module.children()):
            continue
        if any(True for _ in module.parameters()):
            splits = SPLITS[:1] if call.made.shape[-1] == inner else SPLITS[1:]
            width = call.made.shape[-1] // (1 if splits == SPLITS[:1] else 2)
            pieces += [(Piece(name, part), piece(call.made, part)) for part in splits if width == inner]
        elif call.given is not None and call.made.shape[-1] == inner and call.given.shape[-1] == inner:
            acts.append((name, call.given, call.made))
    for name, given, made in acts:
        for read in (part for part, value in pieces if _same(value, given)):
            if _same(made, down.given):
                return FeedForward(_full(block, read), f"{block.path}.{name}")
            others = [(up, other) for up, other in pieces if up != read and other.numel() == made.numel()]
            for up, other in others:
                if _same(made * other.reshape(made.shape), down.given):
                    return FeedForward(_full(block, up), f"{block.path}.{name}", _full(block, read))
    return None


def _full(block: Block, part: Piece) -> Piece:
    return Piece(f"{block.path}.{part.path}", part.part)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, whatever the leading axes."""
    if a.numel() != b.numel():
        return False
    a, b = _flat(a), _flat(b)
    return float((a - b).abs().max()) <= ROUNDINGS * torch.finfo(torch.float32).eps * float(
        b.abs().max()
    ) or bool(torch.equal(a, b))
