"""What a module's `forward` does, in order, read from its source.

Shapes alone cannot tell `v_proj` from `o_proj`, and module names are a convention. The source says which
projection is used after the attention was taken, which one last, and whether the last norm comes after the
residual was added. It needs no weights and no inputs, so it works for models whose weights are elsewhere.
What is read here is a hypothesis; `verify.py` tests it by running.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

ATTENDING = {"softmax", "scaled_dot_product_attention"}
MENTIONS = {"dtype", "device", "shape", "in_features", "out_features", "config"}
"""Attributes that are asked for without computing with their owner."""


@dataclass(frozen=True)
class Step:
    """One thing a method does.

    Attributes:
        kind: `use` (of `self.<name>`), `add` (a sum, such as a residual), `attend` (attention is taken), or
            `branch`, of which only the side that this module's attributes choose is taken, if they decide it.
        name: The attribute, for `use`.
        test, then, otherwise: For `branch`.
    """

    kind: str
    name: str = ""
    test: ast.expr | None = None
    then: tuple[Step, ...] = ()
    otherwise: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Event:
    """A leaf of the expanded forward: `module` is used at `path`, or `add`, or `attend`."""

    kind: str
    path: str = ""
    module: nn.Module | None = None


def method_code(cls: type, name: str) -> Any:
    """The undecorated function behind `cls.<name>`, or None."""
    function = getattr(cls, name, None)
    return inspect.unwrap(function) if inspect.isfunction(function) else None


def own_methods(cls: type) -> Iterator[Any]:
    """Functions of `cls` and its bases below `nn.Module`, undecorated."""
    for base in cls.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("torch."):
            continue
        yield from (inspect.unwrap(item) for item in vars(base).values() if inspect.isfunction(item))


@cache
def steps(cls: type, method: str = "forward") -> tuple[Step, ...] | None:
    """The steps of a method in order of execution, or None if its source cannot be had."""
    function = method_code(cls, method)
    if function is None:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    return tuple(_walk(definition.body, definition.args.args[0].arg))


def _walk(node: Any, me: str) -> Iterator[Step]:
    """Steps below `node`: operands before operators, arguments before the call."""
    if isinstance(node, list):
        for item in node:
            yield from _walk(item, me)
    elif isinstance(node, ast.If | ast.IfExp):
        calls = [part for part in ast.walk(node.test) if isinstance(part, ast.Call)]
        yield from _walk(calls, me)  # `if self.extra is not None` does not use it
        then, otherwise = tuple(_walk(node.body, me)), tuple(_walk(node.orelse, me))
        yield Step("branch", test=node.test, then=then, otherwise=otherwise)
    elif isinstance(node, ast.Call):
        yield from _walk(list(node.args), me)
        yield from _walk([keyword.value for keyword in node.keywords], me)
        yield from _walk(node.func, me)
        if _attends(node, me):
            yield Step("attend")
        elif "add" in _called(node).split("_"):  # dropout_add, torch.add
            yield Step("add")
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
        if isinstance(node.ctx, ast.Load):
            yield Step("use", node.attr)
    elif isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
        return
    elif isinstance(node, ast.Attribute) and node.attr in MENTIONS:
        return  # `x.to(self.o_proj.weight.dtype)` does not use it either
    elif isinstance(node, ast.AST):
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.For):
            children.sort(key=lambda child: _is_target(child, node))
        yield from _walk(children, me)
        if _adds(node):
            yield Step("add")


def _is_target(child: ast.AST, node: ast.AST) -> int:
    """Order of evaluation: the value, then where it goes, then a loop's body."""
    if isinstance(node, ast.For):
        return 0 if child is node.iter else 1 if child is node.target else 2
    return 0 if child is getattr(node, "value", None) else 1


def _attends(call: ast.Call, me: str) -> bool:
    """A call that takes the module itself first (the attention interface), or softmax, or fused attention."""
    if _called(call).lower() in ATTENDING:  # nn.Softmax too
        return True
    first = call.args[0] if call.args else None
    return isinstance(call.func, ast.Name) and isinstance(first, ast.Name) and first.id == me


def _called(call: ast.Call) -> str:
    """The last name of what is called: `softmax` for `F.softmax(...)`."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _adds(node: ast.AST) -> bool:
    """Sums of values; joining tuples or adding literals is not one."""
    literal = ast.Tuple | ast.List | ast.Constant
    if isinstance(node, ast.BinOp):
        return (
            isinstance(node.op, ast.Add)
            and not isinstance(node.left, literal)
            and not isinstance(node.right, literal)
        )
    return (
        isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.Add)
        and not isinstance(node.value, literal)
    )


def events(module: nn.Module, is_leaf: Any, path: str = "") -> list[Event]:
    """The forward of `module` expanded down to leaves.

    Args:
        is_leaf: `is_leaf(child) -> bool`: do not look inside, report the use.
        path: Prefix of the reported paths.
    """
    return list(_expand(module, is_leaf, path, "forward", ()))


def _expand(
    module: nn.Module, is_leaf: Any, path: str, method: str, seen: tuple[str, ...]
) -> Iterator[Event]:
    found = steps(type(module), method)
    if found is None and method == "forward":
        found = tuple(Step("use", name) for name, _ in module.named_children())
    for step in _taken(found or (), module):
        if step.kind != "use":
            yield Event(step.kind)
            continue
        child = module._modules.get(step.name)
        if child is None:
            if step.name not in seen and method_code(type(module), step.name):
                yield from _expand(module, is_leaf, path, step.name, (*seen, step.name))
            continue
        name = f"{path}.{step.name}" if path else step.name
        if is_leaf(child) or isinstance(child, nn.ModuleList):
            yield Event("use", name, child)
        else:
            yield from _expand(child, is_leaf, name, "forward", ())


def _taken(found: tuple[Step, ...], module: nn.Module) -> Iterator[Step]:
    """The steps with branches resolved: the side that is taken, or both if that cannot be said."""
    for step in found:
        if step.kind != "branch":
            yield step
            continue
        truth = _truth(step.test, module)
        if truth is not False:
            yield from _taken(step.then, module)
        if truth is not True:
            yield from _taken(step.otherwise, module)


def _truth(test: ast.expr | None, module: nn.Module) -> bool | None:
    """The truth of `self.x`, `self.config.x`, `not ...`, `... is (not) None`; None if it depends on the inputs."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Is | ast.IsNot):
        other = test.comparators[0]
        known, value = _value(test.left, module)
        if known and isinstance(other, ast.Constant) and other.value is None:
            return (value is None) == isinstance(test.ops[0], ast.Is)
        return None
    known, value = _value(test, module)
    return bool(value) if known and isinstance(value, bool | int | type(None) | nn.Module) else None


def _value(node: ast.expr | None, module: nn.Module) -> tuple[bool, Any]:
    """Whether `node` is an attribute chain from `self`, and its value."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not names or not isinstance(node, ast.Name) or node.id != "self" or names[-1] == "training":
        return False, None
    value: Any = module
    for name in reversed(names):
        if not hasattr(value, name):
            return False, None
        value = getattr(value, name)
    return True, value
