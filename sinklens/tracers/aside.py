"""A pass of the model as it is, in the middle of one that is watched or edited: nothing of this project sees it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from . import attention, experts

_NOBODY = -1
"""A key of no module: while it is there the names in transformers' registries stay."""


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """Take this project's hooks and taps off a model for the length of the block; those of others stay."""
    dicts = [hooks for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]
    kept = [(hooks, list(hooks.items())) for hooks in dicts if any(map(_ours, hooks.values()))]
    taps = dict(attention._attached)
    for hooks, items in kept:
        for key, hook in items:
            if _ours(hook):
                del hooks[key]
    attention._attached.clear()
    attention._attached[_NOBODY] = []
    routed: list[tuple[Any, Any, Any]] = [
        (module.config, module.config._experts_implementation, tap.before[id(module.config)])
        for tap in dict.fromkeys(experts._attached.values())
        for module in cast("list[Any]", tap.modules)
    ]
    for config, _, before in routed:
        config._experts_implementation_internal = before
    try:
        yield
    finally:
        for config, now, _ in routed:
            config._experts_implementation_internal = now
        attention._attached.clear()
        attention._attached.update(taps)
        for hooks, items in kept:
            # Hooks that came in between (libraries put theirs on at the first call) stay behind the others.
            later = [(key, hook) for key, hook in hooks.items() if (key, hook) not in items]
            hooks.clear()
            hooks.update([*items, *later])


def _ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("sinklens.")
