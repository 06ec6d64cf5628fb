"""The report: one HTML file that is complete without scripts, needs no network, and can be read back."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from sinklens.core.adjustable import Adjustable
from sinklens.core.canonical import plain
from sinklens.core.errors import DataError
from sinklens.core.figures import Figure, Samples, Tile
from sinklens.core.head_strip import HeadStrip

from . import (
    assets,
    colour,
    embed,
    first,
    heatmap,
    intervals,
    lines,
    mitigated,
    page,
    published,
    redact,
    samples,
    tables,
    text,
    views,
)
from .album import Album
from .mathml import formula
from .views import FigureView, svgs

MOST_FIGURES = 8
"""Figures of a section shown at once; the others are folded away."""

STATIC_TOKENS, STATIC_PER_PROMPT = 20_000, 512
"""Tokens written into the page in all and per prompt; the script shows the others from the embedded data."""


def render_report(
    document: Mapping[str, Any],
    figures: Mapping[str, Sequence[Figure]],
    tiles: Sequence[Tile],
    prompts: Sequence[Mapping[str, Any]] | None,
    methods: Sequence[Mapping[str, Any]],
    *,
    title: str | None = None,
    include_text: bool = True,
    methods_paragraph: str | None = None,
    pictures: Mapping[str, np.ndarray] | None = None,
    adjustable: Mapping[str, Adjustable] | None = None,
    heads: Sequence[HeadStrip] = (),
) -> str:
    """The report as one self-contained HTML string.

    Args:
        document: The `sinklens/run/1` document.
        figures: Analyzer name to its figures.
        tiles: Boxes of the first screen, most important first; six stand on the first screen.
        prompts: `index, source, domain, n_tokens, sha256, pieces, token_ids` each, or None.
        methods: One mapping per analyzer: `name, title, first_line, formula_mathml, how, compared, not_trust,
            parameters, reference, source_file`; `methods_paragraph` in any of them is printed once.
        title: Of the page; the model's name by default.
        include_text: False leaves out every token, prompt and picture; hashes and counts stay.
        methods_paragraph: A paragraph ready to copy into a paper; overrides the ones in `methods`.
        pictures: Small RGB copies, `[y, x, 3]` of 8 bits, by the `sha256` of the picture they show.
        adjustable: What the thresholds of an analyzer read, to move them in the page.
        heads: Attention by head on the tokens of some prompts, for the head view.

    Raises:
        DataError: `document` is not a `sinklens/run/1` document.
    """
    if document.get("schema") != embed.RUN_SCHEMA:
        raise DataError(
            "This is not the document of a sinklens run.",
            detail=f"Expected schema {embed.RUN_SCHEMA!r}, found {document.get('schema')!r}.",
            hint="Pass summary.json of a run folder: sinklens report RUN",
        )
    record: dict[str, Any] = _plain(document)
    given = list(prompts or ())
    drawn = {name: list(found) for name, found in figures.items()}
    movable = dict(adjustable or {})
    if not include_text:
        redactor = redact.Redactor(record, given)
        record = redactor.document(record)
        drawn = {name: [redactor.figure(figure) for figure in found] for name, found in drawn.items()}
        tiles = [redactor.tile(tile) for tile in tiles]
        given = [redactor.prompt(prompt) for prompt in given]
        movable = {name: redactor.adjustable(found) for name, found in movable.items()}
    paragraph = methods_paragraph or _paragraph(methods)
    album = Album((pictures or {}) if include_text else None)
    return _render(
        record, drawn, tiles, given, methods, paragraph, title, include_text, album, movable, heads
    )


def write_report(path: str | os.PathLike[str], *args: Any, **options: Any) -> Path:
    """`render_report` into a file; an older report stays until the new one is complete. Returns the path."""
    return assets.write(path, render_report(*args, **options))


def _render(
    document: dict[str, Any],
    figures: Mapping[str, Sequence[Figure]],
    tiles: Sequence[Tile],
    prompts: Sequence[Mapping[str, Any]],
    methods: Sequence[Mapping[str, Any]],
    paragraph: str,
    title: str | None,
    include_text: bool,
    album: Album,
    adjustable: Mapping[str, Adjustable],
    heads: Sequence[HeadStrip],
) -> str:
    found = page.sections(document, methods)
    ids = {section.analyzer: section.id for section in found} | {mitigated.SECTION: mitigated.SECTION}
    data: dict[str, Any] = {}
    drawings = {s.analyzer: views.draw_all(s.id, figures.get(s.analyzer, ()), data, album) for s in found}
    boxes, rest = first.split_tiles(tiles)
    payload = {
        "schema": embed.SCHEMA,
        "document": document,
        "figures": data,
        "tokens": embed.tokens(prompts) if include_text else None,
        "text": include_text,
        "heads": embed.heads(heads, prompts),
        "headlines": page.HEADLINES,
        "adjustable": {name: embed.adjustable(item) for name, item in adjustable.items()},
    }
    under = mitigated.view(document, figures.get(mitigated.SECTION, ()), data)
    described = [_method(method) for method in methods if method.get("name")]
    script = assets.script()
    return assets.template("report.html").render(
        **_facts(document, title),
        ids=ids,
        mitigated=under,
        navigation=first.navigation(found),
        tiles=page.tile_views(boxes, ids, methods),
        more_tiles=page.tile_views(rest, ids, methods),
        first=_first_screen(figures, found, document, controls=_controls(adjustable)),
        sections=[(s, drawings[s.analyzer], tables.table(s.rows, s.units, s.labels)) for s in found],
        prompts=[redact.bare_prompt(prompt) for prompt in prompts],
        viewer=_viewer(prompts) if include_text else [],
        include_text=include_text,
        adjustable=adjustable,
        heads=heads,
        pictures=album.definitions,
        methods=described,
        method_ids={method["name"]: method["id"] for method in described},
        paragraph=paragraph,
        script=Markup(script),
        script_hash=embed.script_hash(script),
        style=Markup(assets.stylesheet()),
        payload=Markup(embed.script_json(payload)),
        block=embed.BLOCK,
        levels=colour.LEVELS,
    )


def _facts(document: Mapping[str, Any], title: str | None) -> dict[str, Any]:
    """What the page says straight from the document."""
    model, manifest = document.get("model") or {}, document.get("manifest") or {}
    verdict = page.verdict(document)
    return {
        "title": title or f"{model.get('id') or 'Model'} · sinklens",
        "model": {"id": None, "revision": None, **model},
        "chips": page.chips(document),
        "verdict": verdict,
        "body_class": "trusted" if verdict.trusted else "untrusted",
        "checks": page.checks(document),
        "warnings": page.warnings(document),
        "sinks": _sink_positions(document),
        "groups": page.manifest_groups(manifest),
        "command": page.command(manifest),
        "beside": published.beside(document),
        "most_lines": first.FIRST_LINES,
        "most_figures": MOST_FIGURES,
    }


def _first_screen(
    figures: Mapping[str, Sequence[Figure]],
    found: Sequence[page.Section],
    document: Mapping[str, Any],
    *,
    controls: int,
) -> dict[str, FigureView | None]:
    """The main map, the curve and the strip, drawn to fit; they share the embedded values of their sections."""
    shown: dict[str, FigureView | None] = {"map": None, "norms": None, "strip": None}
    ids = {section.analyzer: section.id for section in found}
    known = {name: given for name, given in figures.items() if name in ids}
    beside = first.strip(known)
    widths, height = first.sizes(
        page.verdict(document), found, page.checks(document), with_strip=beside is not None, controls=controls
    )
    if (main := first.main_map(known)) is not None:
        name, figure = main
        identifier = f"{ids[name]}--{text.slug(figure.key)}"
        flat = samples.rate_map(figure) if isinstance(figure, Samples) else figure
        drawing = heatmap.draw(flat, figure_id=identifier, width=widths[0], height=height, cap=(120, 64))
        shown["map"] = FigureView(
            identifier, flat.title, flat.caption, flat.unit, svgs(drawing), drawing.notes
        )
    if (curve := first.norm_curve(known)) is not None:
        name, line = curve
        identifier = f"{ids[name]}--{text.slug(line.key)}"
        drawing = lines.draw(line, figure_id=identifier, width=widths[1], height=height - 18)
        shown["norms"] = FigureView(identifier, line.title, line.caption, "", svgs(drawing), drawing.notes)
    if beside is not None:
        name, row = beside
        identifier = f"{ids[name]}--{text.slug(row.key)}"
        few = first.narrow(row, height)
        step = min(first.MOST_ROW, max(first.LEAST_ROW, (height - 60) / max(1, len(few.rows))))
        drawing = intervals.draw(few, width=widths[2], row_height=step)
        left = sum(math.isfinite(item.value) for item in row.rows) - len(few.rows)
        notes = (f"{left} more in its section.",) if left and drawing.svg is not None else ()
        shown["strip"] = FigureView(identifier, row.title, row.caption, "", svgs(drawing), notes)
    return shown


def _controls(adjustable: Mapping[str, Adjustable]) -> int:
    """Thresholds that stand below the verdict because it follows them."""
    return sum("epsilon" in item.arrays for item in adjustable.values())


def _viewer(prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tokens that stand in the page itself, within the budget."""
    left, views = STATIC_TOKENS, []
    for place, prompt in enumerate(prompts):
        pieces = list(prompt.get("pieces") or ())
        shown = pieces[: max(0, min(left, STATIC_PER_PROMPT))]
        left -= len(shown)
        views.append(
            {"place": place, "shown": [text.token(p) for p in shown], "missing": len(pieces) - len(shown)}
        )
    return views


def _sink_positions(document: Mapping[str, Any]) -> frozenset[int]:
    """Positions the primary-sinks table names; marked in the token viewer."""
    rows = ((document.get("findings") or {}).get("primary-sinks") or {}).get("rows") or ()
    return frozenset(row["position"] for row in rows if isinstance(row.get("position"), int))


def _method(method: Mapping[str, Any]) -> dict[str, Any]:
    blank = dict.fromkeys(("title", "authors", "year", "url", "section", "code", "bibtex"))
    reference = {**blank, **(method.get("reference") or {})}
    return {
        **{key: method.get(key) or "" for key in ("title", "source_file")},
        **{
            key: text.prose(str(method.get(key) or ""))
            for key in ("first_line", "how", "compared", "not_trust")
        },
        "name": str(method["name"]),
        "id": "method-" + text.slug(str(method["name"])),
        "formula": formula(str(method.get("formula_mathml") or method.get("formula") or "")),
        "parameters": page.pairs(method.get("parameters") or {}),
        "reference": reference,
        "url": text.web_link(reference.get("url")),
        "code": text.repository_link(reference.get("code")),
    }


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    found = plain(document)
    assert isinstance(found, dict)
    return found


def _paragraph(methods: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(
        dict.fromkeys(str(m["methods_paragraph"]) for m in methods if m.get("methods_paragraph"))
    )
