"""The text of docs/api.md: public names with signature, docstring and parameters, read from the code.

What is public is read too: `sinklens.__all__`, the registries, `__all__` of the testbeds and the error classes.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns")
_HEADINGS = {"Args": "Parameters", "Attributes": "Attributes", "Warns": "Warnings"}
_WIDTH = 100
_METHOD = r"^(How it is computed:|Compared with the paper:|When not to trust it:)"


def page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for title, about, entries in _parts():
        written = [entry(name, thing, own=own) for name, thing, own in entries]
        parts.append("\n".join([f"## {title}\n", f"{about}\n", *written]))
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _parts() -> Iterator[tuple[str, str, list[tuple[str, Any, bool]]]]:
    """Title, a line about it, and names with what they stand for; False shows a class without its members."""
    import sinklens as sl
    from sinklens import analyzers, mitigations, testbeds
    from sinklens.core import errors
    from sinklens.evaluation import tasks
    from sinklens.evaluation.tasks import harness as harness  # registers its task

    top = [(name, getattr(sl, name)) for name in sl.__all__]
    functions = [(f"sl.{name}", thing, True) for name, thing in top if inspect.isfunction(thing)]
    yield "Functions", "`import sinklens as sl` loads none of them until it is used.", functions
    yield "Runs, traces and findings", "What those functions return.", list(_results(dict(top)))
    modules = [(name, thing) for name, thing in top if isinstance(thing, ModuleType)]
    for name in ("tl", "nns"):
        module = dict(modules)[name]
        found = [(f"sl.{name}.{key}", thing, True) for key, thing in _defined_in(module)]
        yield f"sl.{name}", f"{_first(module)} See [backends.md](backends.md).", found
    base = [("sl.analyzers.Analyzer", analyzers.Analyzer, True)]
    called = ("chosen_analyzers", "make")
    base += [(f"sl.analyzers.{name}", getattr(analyzers, name), True) for name in called]
    yield "sl.analyzers", _ANALYZERS, [*base, *_registered("sl.analyzers", analyzers.registry, own=False)]
    common = [("sl.mitigations.Method", mitigations.Method, True)]
    common += [("sl.mitigations.Recipe", mitigations.Recipe, True)]
    methods = _registered("sl.mitigations", mitigations.registry, own=False)
    yield "sl.mitigations", _MITIGATIONS, [*common, *methods]
    asked = [("Task", tasks.Task, True)]
    asked += [
        (name.removeprefix("."), cls, own) for name, cls, own in _registered("", tasks.registry, own=False)
    ]
    asked += [(name, getattr(tasks, name), True) for name in tasks.__all__ if name.startswith("task")]
    asked.append(("read_task", tasks.read_task, True))
    yield "Tasks", "In `sinklens.evaluation.tasks`; see [mitigations.md](mitigations.md).", asked
    beds = [(name, getattr(testbeds, name), True) for name in testbeds.__all__]
    yield "Testbeds", "In `sinklens.testbeds`; see [testbeds.md](testbeds.md).", beds
    raised = [(name, thing, True) for name, thing in _defined_in(errors)]
    yield "Errors", "In `sinklens.core.errors`; the exit code of a command is the class's.", raised


def _results(top: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    from sinklens.analyzers.base import Finding
    from sinklens.mitigations.effect import Effect
    from sinklens.pipeline.compare import Comparison
    from sinklens.pipeline.mass_ledger import Ledger
    from sinklens.pipeline.mitigation_run import Evaluation, MitigationRun
    from sinklens.pipeline.options import ProfileOptions
    from sinklens.pipeline.shown import RunFinding, Shown
    from sinklens.pipeline.tables import Rows
    from sinklens.pipeline.verdict import Verdict
    from sinklens.tracers.selfcheck import Check
    from sinklens.tracers.trace import PromptRecord

    yield "sl.Run", top["Run"], True
    yield "sl.Trace", top["Trace"], True
    for cls in (PromptRecord, Finding, RunFinding, Verdict, Check, Shown, Comparison, MitigationRun):
        yield cls.__name__, cls, True
    for cls in (Rows, Evaluation, Ledger, Effect, ProfileOptions):
        yield cls.__name__, cls, True


def _registered(prefix: str, registry: Any, *, own: bool) -> list[tuple[str, Any, bool]]:
    classes = sorted((cls for _, cls in registry.items()), key=lambda cls: cls.__name__.lower())
    return [(f"{prefix}.{cls.__name__}", cls, own) for cls in classes]


def _defined_in(module: ModuleType) -> list[tuple[str, Any]]:
    """Public classes and functions of a module, in the order of its file."""
    return [
        (name, thing)
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    ]


def entry(name: str, thing: Any, *, own: bool) -> str:
    """A function, or a class with its public members if `own`."""
    lines = [f"### {name}\n", _code(_signature(name, thing))]
    bases = _bases(thing) if inspect.isclass(thing) else []
    if bases:
        lines.append(f"Base: {', '.join(f'`{base}`' for base in bases)}.\n")
    doc = inspect.getdoc(thing) if _documented(thing) else ""
    if name.startswith("sl.analyzers.") and hasattr(thing, "formula"):
        doc = re.sub(rf"(?ms){_METHOD}.*?(?:\n\n|\Z)", "", doc)
        lines.append(f"[What it computes](analyzers.md#{thing.name})\n")
    lines.append(described(doc))
    reference = getattr(thing, "reference", None) if inspect.isclass(thing) else None
    if reference is not None and getattr(reference, "url", ""):
        lines.append(f"Source: [{reference.title}]({reference.url}).\n")
    if own and inspect.isclass(thing):
        lines += [_member(key, kind, member, _inherited(thing, key)) for key, kind, member in members(thing)]
    return "\n".join(line for line in lines if line)


def members(cls: type) -> list[tuple[str, str, Any]]:
    """Public methods and properties that a class defines itself: name, kind, the function."""
    found = []
    for key, member in vars(cls).items():
        if key.startswith("_"):
            continue
        if isinstance(member, property):
            found.append((key, "property", member.fget))
        elif isinstance(member, cached_property):
            found.append((key, "property", member.func))
        elif isinstance(member, classmethod | staticmethod):
            found.append((key, "class method", member.__func__))
        elif inspect.isfunction(member):
            found.append((key, "method", member))
    return found


def _inherited(cls: type, key: str) -> str:
    """The docstring of a member, or of the one it overrides in a class of ours (other libraries extend `object`)."""
    ours = (base for base in cls.__mro__ if base.__module__.startswith("sinklens"))
    found = (vars(base)[key] for base in ours if key in vars(base))
    docs = (getattr(member, "__func__", member).__doc__ for member in found)
    return inspect.cleandoc(next((doc for doc in docs if doc), ""))


def _member(key: str, kind: str, function: Any, words: str) -> str:
    doc = described(words)
    if kind == "property":
        kept = inspect.signature(function).return_annotation
        of = "" if kept is inspect.Signature.empty else f": {_annotation(kept)}"
        return f"#### .{key}\n\n{_code(f'{key}{of}')}\n{doc}"
    return f"#### .{key}()\n\n{_code(_signature(key, function))}\n{doc}"


def _documented(thing: Any) -> bool:
    """Whether it has words of its own; a dataclass without gets its signature from Python, and exceptions a text."""
    doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return bool(doc) and not (is_dataclass(thing) and str(doc).startswith(f"{thing.__name__}("))


def _bases(cls: type) -> list[str]:
    return [
        base.__name__
        for base in cls.__bases__
        if base.__module__.startswith("sinklens") or issubclass(cls, Warning)
    ]


def _signature(name: str, thing: Any) -> str:
    """As it would be written, on one line or with a line for each parameter."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    if inspect.isclass(thing) and issubclass(thing, Exception) and "__init__" not in vars(thing):
        return f"{name}(...)  # as its base"
    made = _defaults(thing)
    shown, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls") or parameter.name.startswith("_"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            shown.append("*")
            star = True
        star = star or parameter.kind is parameter.VAR_POSITIONAL
        shown.append(_parameter(parameter, made))
    back = found.return_annotation
    end = "" if inspect.isclass(thing) or back is inspect.Signature.empty else f" -> {_annotation(back)}"
    line = f"{name}({', '.join(shown)}){end}"
    if len(line) <= _WIDTH or not shown:
        return line
    return "\n".join([f"{name}(", *(f"    {one}," for one in shown), f"){end}"])


def _parameter(parameter: inspect.Parameter, made: dict[str, str]) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    of = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{stars}{parameter.name}{of}"
    value = made.get(parameter.name) or repr(parameter.default)
    return f"{parameter.name}{of}{' = ' if of else '='}{value}"


def _defaults(thing: Any) -> dict[str, str]:
    """Values that a dataclass makes for each object, which a signature cannot show."""
    if not is_dataclass(thing):
        return {}
    made = ((f.name, f.default_factory) for f in fields(thing) if f.default_factory is not MISSING)
    return {name: repr(factory()) if factory in (list, dict, tuple, set) else "..." for name, factory in made}


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def described(doc: str) -> str:
    """A docstring as Markdown: paragraphs as they are, its sections as lists."""
    blocks, section = [], ""
    for block in re.split(r"\n\s*\n", doc.strip()):
        head, _, rest = block.partition("\n")
        if head.rstrip(":") in SECTIONS and head.endswith(":"):
            section = head.rstrip(":")
            blocks.append(_section(section, textwrap.dedent(rest)))
        elif section and block.startswith(" "):
            blocks.append(_section("", textwrap.dedent(block)))
        elif block.strip():
            blocks.append(_paragraph(block))
    return "\n".join(f"{block}\n" for block in blocks if block)


def _section(name: str, body: str) -> str:
    """`name: text` entries as a list; running text stays a paragraph."""
    entries = re.split(r"\n(?=\S)", body.strip())
    pairs = [re.match(r"([*\w.`, \[\]]+?): (.*)", one, re.DOTALL) for one in entries]
    title = f"{_HEADINGS.get(name, name)}: " if name else ""
    if name in ("Returns", "Yields") or not all(pairs):
        return f"**{title.strip()}** {_joined(body)}" if title else _joined(body)
    items = [f"- {_names(pair[1])}: {_joined(pair[2])}" for pair in pairs if pair is not None]
    return "\n".join([f"**{title.strip()}**\n", *items] if title else items)


def _names(text: str) -> str:
    return ", ".join(f"`{name.strip(' `')}`" for name in text.split(","))


def _paragraph(block: str) -> str:
    """Running text on one line; what is set out in lines of its own keeps them."""
    block = textwrap.dedent(block)
    if block.startswith((">>>", "with ", "run = ", "    ")):
        return f"```text\n{block}\n```"
    return _joined(re.sub(_METHOD, r"**\1** ", block))


def _joined(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") if "`" not in text else " ".join(text.split())


def _code(text: str) -> str:
    return f"```text\n{text}\n```\n"


def _first(thing: Any) -> str:
    return (thing.__doc__ or "").strip().split("\n", 1)[0].split(": `")[0].rstrip(".") + "."


def names() -> Iterable[str]:
    """Everything that the page has an entry for."""
    return (name for _, _, entries in _parts() for name, _, _ in entries)


_HEAD = """# API reference

<!-- Written by docs/api_reference.py from the code; edit the docstrings, not this page. -->

Every public name with its signature, what it does and what it raises. `sl` is `sinklens`. Layers, heads, dims, experts
and positions are 0-based everywhere. Names that are not here are not public and may change.
"""
_ANALYZERS = (
    "A class per method; its fields are the method's parameters. What each computes, where it departs from its paper "
    "and when not to trust it stands in [analyzers.md](analyzers.md)."
)
_MITIGATIONS = (
    "A class per method, put on a model for the length of a `with`; `sl.mitigate` calibrates and judges them "
    "([mitigations.md](mitigations.md))."
)
