"""Writes docs/analyzers.md, docs/signals.md, docs/api.md and tables of docs/backends.md and docs/mitigations.md.

    python docs/generate.py

A test holds them equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def analyzers_page() -> str:
    """Every analyzer in its own words, in the order of the chain."""
    from sinklens.analyzers import registry
    from sinklens.pipeline.methods import describe_method

    classes = sorted((cls for _, cls in registry.items()), key=lambda cls: (cls.place, cls.name))
    parts = [_HEAD_ANALYZERS, _overview(classes)]
    parts += [_analyzer(describe_method(cls()), default=cls.default) for cls in classes]
    return "\n".join(parts)


def signals_page() -> str:
    """Every quantity that a trace can hold, with who reads it."""
    from sinklens.analyzers import registry
    from sinklens.tracers.signals import ALL_SIGNALS, LISTED, PLACED, POSITIONED, Source

    readers: dict[str, list[str]] = {}
    for cls in sorted((cls for _, cls in registry.items()), key=lambda cls: (cls.place, cls.name)):
        for signal in cls.needs:
            readers.setdefault(signal.name, []).append(f"`{cls.name}`")
    parts = [_HEAD_SIGNALS]
    for source in Source:
        parts += [
            f"## {_SOURCES[source.value]}\n",
            "| Signal | Shape | Unit | Meaning | Read by |",
            "|---|---|---|---|---|",
        ]
        for signal in ALL_SIGNALS:
            if signal.source is source:
                also = (
                    "; also `_layer`, `_pos`, `_dim`"
                    if signal in LISTED
                    else "; also `_pos`, `_dim`"
                    if signal in PLACED
                    else "; also `_pos`"
                    if signal in POSITIONED
                    else ""
                )
                cells = (
                    f"`{signal.name}`{also}",
                    " × ".join(signal.axes),
                    signal.unit,
                    signal.meaning,
                    ", ".join(readers.get(signal.name, [])) or "none yet",
                )
                parts.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def backends_page() -> str:
    """The page as it is, with its table written again."""
    page = (HERE / "backends.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(_TABLE)
    head, _, after = rest.partition(_TABLE_END)
    return f"{before}{_TABLE}{head.partition(chr(10))[0]}\n{_capabilities()}{_TABLE_END}{after}"


def mitigations_page() -> str:
    """The page as it is, with its table of methods written again."""
    page = (HERE / "mitigations.md").read_text(encoding="utf-8")
    before, _, rest = page.partition(_TABLE)
    head, _, after = rest.partition(_TABLE_END)
    return f"{before}{_TABLE}{head.partition(chr(10))[0]}\n{_methods()}{_TABLE_END}{after}"


def _methods() -> str:
    """Every method, its own parameters with their defaults, and what it does."""
    from dataclasses import MISSING, fields

    from sinklens.mitigations import registry
    from sinklens.mitigations.attention_method import AttentionMethod
    from sinklens.pipeline.methods import first_line

    shared = {field.name for field in fields(AttentionMethod)}
    lines = ["| `--with` | Source | Parameters | What it does |", "|---|---|---|---|"]
    for name, cls in sorted(registry.items()):
        given = [
            f"`{field.name}`" if field.default is MISSING else f"`{field.name}={_plain(field.default)}`"
            for field in fields(cls)
            if field.name not in shared
        ]
        cells = (f"`{name}`", cls.reference.label, " ".join(given), first_line(cls))
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _plain(value: Any) -> str:
    """A default as it is written on the command line."""
    if isinstance(value, tuple):
        return "+".join(map(str, value)) or "()"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def api_page() -> str:
    """Every public name; see `api_reference.py` beside this file."""
    from api_reference import page

    return page()


def _capabilities() -> str:
    """Signals that the same backends give, together."""
    from sinklens.pipeline.backends import capability_rows
    from sinklens.tracers.backends import backends

    names = list(backends)
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in capability_rows():
        key = row["source"], *(row[name] for name in names)
        groups.setdefault(key, []).append(f"`{row['signal']}`")
    lines = [
        f"| Seen | Signals | {' | '.join(f'`{name}`' for name in names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for (source, *given), signals in groups.items():
        cells = [source, ", ".join(signals), *("yes" if can == "yes" else f"no: {can}" for can in given)]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _overview(classes: list[Any]) -> str:
    rows = ["| Analyzer | What it finds | Runs by default |", "|---|---|---|"]
    for cls in classes:
        method = (cls.__doc__ or "").split("\n", 1)[0]
        always = "with pictures" if cls.of_pictures else "yes"
        default = always if cls.default else "with `--analyzers all` or by name"
        rows.append(f"| [`{cls.name}`](#{cls.name}) | {_cell(method)} | {default} |")
    return "\n".join([*rows, ""])


def _analyzer(method: dict[str, Any], *, default: bool) -> str:
    from sinklens.report.mathml import linear

    reference = method["reference"]
    where = f", {reference['section']}" if reference["section"] else ""
    code = reference["code"] if reference["code"] and reference["code"] != reference["url"] else ""
    settings = [f"`{key} = {value}`" for key, value in method["parameters"].items()]
    lines = [
        f"## {method['name']}",
        "",
        f"**{method['title']}.** {method['first_line']}" + ("" if default else " Runs only when asked for."),
        "",
        "```text",
        linear(method["formula"]),
        "```",
        "",
        f"**How it is computed.** {_sentence(method['how'])}",
        "",
        f"**Compared with the paper.** {_sentence(method['compared'])}",
        "",
        f"**When not to trust it.** {_sentence(method['not_trust'])}",
        "",
        f"**Parameters.** {', '.join(settings) or 'none'}.",
        "",
        f"**Summary.** {', '.join(f'`{name}`' for name in method['summarises'])}.",
        "",
        f"**Signals.** {', '.join(f'`{name}`' for name in method['needs']) or 'none: it reads the experiments'}.",
        "",
        f"**Reference.** {reference['authors'].replace(' and ', ', ')} ({reference['year']}). "
        f"[{reference['title']}]({reference['url']}){where}." + (f" [Code]({code})." if code else ""),
        "",
    ]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    """Text that may stand in a table: no column marks, no line ends."""
    return " ".join(text.replace("|", "\\|").split())


_HEAD_ANALYZERS = """# Analyzers

<!-- Written by docs/generate.py from the analyzers themselves; edit their docstrings, not this page. -->

An analyzer reads a trace, never a model, and answers one question. What follows is what each says of itself: the
formula, how it is computed, where it departs from the paper it follows, and when not to trust it. Change a parameter
with `--analyzers name:parameter=value`, or later on a saved run with `run.analyze(...)`; the model is not needed again.
"""

_HEAD_SIGNALS = """# Signals

<!-- Written by docs/generate.py from sinklens/tracers/signals.py; edit that file, not this page. -->

A trace holds reductions, no attention maps: each quantity below, per prompt. Only what the chosen analyzers read is
recorded. Axes: `layer` blocks; `head` query heads; `pos` the tokens of a prompt from its first real token on; `kept`
the positions listed in `kept_positions`; `rank` strongest first; `slot` the experts chosen for one token; `bin` equal
bins of [0, 1]; `reference` the two reference positions; `entry` traced entries of a block; `birth` alignments in order
of layer; `part` the parts of a feed-forward block; `row`, `col` the first tokens; `large` entries that are large for
their state, over all layers; `key_class`, `floor`, `share_bin` classes of keys, and bins, of what text reads from
pictures. Everything counts from 0. A layer without the quantity holds NaN, or -1 where the values are indices.
Of prompts with pictures only: `vision_layer`, `vision_head` blocks and heads of the vision tower; `patch` places in
its own sequence; `visual` the visual tokens in order; `reason` why a row of the vocabulary is left out;
`sublayer` attention, feed-forward part; `query_set` text after the first picture, last token, generated; `pair_set`
text, visual queries; `trace` as it is, and divided by its sum.
"""

_TABLE, _TABLE_END = "<!-- table", "<!-- end of table -->"

_SOURCES = {
    "attention": "At the attention",
    "residual": "In the residual stream",
    "down_proj": "At the down projection",
    "experts": "At the experts",
    "vision": "In the vision tower",
}


def main() -> None:
    (HERE / "analyzers.md").write_text(analyzers_page(), encoding="utf-8")
    (HERE / "signals.md").write_text(signals_page(), encoding="utf-8")
    (HERE / "backends.md").write_text(backends_page(), encoding="utf-8")
    (HERE / "mitigations.md").write_text(mitigations_page(), encoding="utf-8")
    (HERE / "api.md").write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
