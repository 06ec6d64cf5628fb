"""The roles inside one block, read from the order in which its forward uses its parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .parts import expert_count, is_leaf, is_norm, linear_shape
from .reading import Event, events
from .spec import Block


@dataclass(frozen=True)
class Linears:
    """The linear maps of a block in order of use: path within the block to `(inputs, outputs)`."""

    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, block: nn.Module, found: list[Event]) -> Linears:
        """Used ones in order of their last use; ones the source does not mention come first, as registered."""
        registered = [name for name, _ in _linear_leaves(block)]
        used = [event.path for event in found if event.module is not None and linear_shape(event.module)]
        order = list(dict.fromkeys(reversed(used)))[::-1]
        names = [*(name for name in registered if name not in order), *order]
        return cls({name: linear_shape(block.get_submodule(name)) or (0, 0) for name in names})


def _linear_leaves(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Linear maps, not looking inside wrapped ones (adapters)."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        found += [(path, child)] if linear_shape(child) else _linear_leaves(child, f"{path}.")
    return found


def attention_output(block: nn.Module, attention: str) -> str | None:
    """W_O: the last map used inside the attention after attending, else the first one after it in the
    module around it (BERT)."""
    inside = events(block.get_submodule(attention), is_leaf, attention)
    found = events(block, is_leaf)
    last, attended = None, False
    for event in inside:
        attended |= event.kind == "attend"
        if event.module is not None and linear_shape(event.module):
            last = event.path if attended else None
    if last is not None:
        return last
    wrapper = attention.rpartition(".")[0]
    if not wrapper:
        return None
    paths = [event.path for event in found if event.module is not None and linear_shape(event.module)]
    own = [i for i, path in enumerate(paths) if _within(path, attention)]
    after = [path for path in paths[own[-1] + 1 :] if _within(path, wrapper)] if own else []
    return after[0] if after else None


def read_block(
    block: nn.Module, path: str, index: int, attention: str | None, hidden: int, like: Block | None = None
) -> Block:
    """Roles in `block`, which sits at `path`.

    Args:
        attention: Path of its attention within the block, or None.
        hidden: Width of the residual stream.
        like: A block of the same tower that has attention; a block without takes its feed-forward place.
    """
    found = events(block, is_leaf)
    linears = Linears.of(block, found)
    output = attention_output(block, attention) if attention else None
    moe, experts, router = _mixture(block, hidden)
    writers = [
        name
        for name, (_, outputs) in linears.shapes.items()
        if outputs == hidden and not _within(name, attention) and name not in (output, router)
        if _plain(block, name)
    ]
    inner = [name for name in writers if moe and _within(name, moe)]
    place = like.down_proj.removeprefix(f"{like.path}.") if like and like.down_proj else None
    down = _writer([name for name in writers if name not in inner], linears, hidden, place)
    shared = _writer(inner, linears, hidden)
    mlp = moe or (down and _holder(block, down, linears, hidden))

    def full(name: str | None) -> str | None:
        return f"{path}.{name}" if name else None

    return Block(
        index=index,
        path=path,
        attention=full(attention),
        attention_output=full(output),
        mlp=full(mlp),
        down_proj=full(down),
        shared_down_proj=full(shared),
        experts=full(experts),
        router=full(router),
        residual_norm=full(_residual_norm(found)),
    )


def _within(name: str, part: str | None) -> bool:
    return part is not None and (name == part or name.startswith(f"{part}."))


def _mixture(block: nn.Module, hidden: int) -> tuple[str | None, str | None, str | None]:
    """Paths of the mixture module (None if it is the block itself), of its experts and of its router."""
    experts = next((name for name, module in block.named_modules() if name and expert_count(module)), None)
    if experts is None:
        return None, None, None
    count, parent = expert_count(block.get_submodule(experts)), experts.rpartition(".")[0]
    router = None
    for name, module in block.get_submodule(parent).named_modules():
        weight = getattr(module, "weight", None)
        shape = linear_shape(module) or (tuple(weight.shape[::-1]) if weight is not None else None)
        if name and shape == (hidden, count):
            router = f"{parent}.{name}" if parent else name
            break
    return parent or None, experts, router


def _plain(block: nn.Module, name: str) -> bool:
    """Whether the modules around a map own nothing but maps and norms: state-space mixers own more."""
    parent = name.rpartition(".")[0]
    while parent:
        module = block.get_submodule(parent)
        convolves = any(isinstance(child, nn.Conv1d) for child in module.children())
        if (
            convolves
            or type(module).__name__.lower().endswith("norm")
            or isinstance(module, nn.ModuleList)
            or any(True for _ in module.parameters(recurse=False))
        ):
            return False
        parent = parent.rpartition(".")[0]
    return True


def _writer(names: list[str], linears: Linears, hidden: int, place: str | None = None) -> str | None:
    """The feed-forward output among maps to the residual width: the one at `place`, else by shape.

    A map that does not read the residual width beats one that does (a fused gate of half width also writes
    `hidden` values); then the widest input; then the last used.
    """
    if place in names:
        return place
    inputs = {name: linears.shapes[name][0] for name in names}
    return max(
        names, key=lambda name: (inputs[name] != hidden, inputs[name], names.index(name)), default=None
    )


def _holder(block: nn.Module, down: str, linears: Linears, hidden: int) -> str | None:
    """The smallest module that holds both `down` and a map that reads the residual width."""
    parent = down.rpartition(".")[0]
    while parent:
        if any(
            _within(name, parent) and name != down and inputs == hidden
            for name, (inputs, _) in linears.shapes.items()
        ):
            return parent
        parent = parent.rpartition(".")[0]
    return None


def _residual_norm(found: list[Event]) -> str | None:
    """The last norm, if nothing is added and no map is used after it: the block is post-LayerNorm."""
    for event in reversed(found):
        if event.kind == "add":
            return None
        if event.module is not None and is_norm(event.module):
            return event.path
        if event.module is not None and (linear_shape(event.module) or expert_count(event.module)):
            return None
    return None
