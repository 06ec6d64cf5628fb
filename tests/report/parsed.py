"""The page as elements and text, and text that tries to break out."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from sinklens.core.figures import (
    Estimate,
    Event,
    Heatmap,
    Intervals,
    Life,
    Lines,
    PictureMap,
    Samples,
    Series,
    Tile,
    Timeline,
)
from sinklens.core.pictures import CellClass, CellGrid, PicturePage, PictureRef, Quantity

from . import factory

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    "<img src=x onerror=alert(3)>",
    '"><svg onload=alert(4)>',
    "\u202egnp.exe",
    "a\u2028b\u2029c",
    "&lt;b&gt;",
    "x" * 3000,
    "\x00\x07\ud800",
    "{{ 7*7 }}{% raw %}",
    "-->]]><!--",
)


class Page(HTMLParser):
    """Elements, their attributes and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "pre", "title"):
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif not self.stack or self.stack[-1] != "style":
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.elements if (value := attrs.get(name)) is not None]

    def data(self) -> dict[str, Any]:
        return json.loads(next(body for attrs, body in self.scripts if attrs.get("id") == "sinklens-run"))


def _picture_map(text: str) -> PictureMap:
    ref = PictureRef(0, 0, text, 4, 4, "0" * 64)
    cells = np.arange(4).reshape(2, 2)
    grid = CellGrid(text, (0.0, 0.0, 4.0, 4.0), cells, cells[None] / 4, cells % 2)
    quantity = Quantity(text, text, text, scale=text, threshold=0.5, threshold_label=text)
    page = PicturePage(ref, (grid,), text, ((text, 0.5),))
    return PictureMap(text, text, text, (page, page), (quantity,), (CellClass(text, text, text),), text, text)


def poisoned(text: str) -> factory.Run:
    """A run with the text in every place a string can stand."""
    run = factory.make()

    def poison(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        keep = key in ("schema", "status", "formula_mathml") or not isinstance(value, str)
        return value if keep else text

    document = poison(run.document)
    document["findings"][text] = document["findings"]["primary-sinks"] | {
        "rows": [{text: text, "token": text}]
    }
    figures = {
        name: [replace(figure, key=text, title=text, caption=text) for figure in found]
        for name, found in run.figures.items()
    }
    grid = np.array([[0.1, 0.2], [0.3, np.nan]])
    figures[text] = [
        Heatmap(text, text, text, grid, text, text, text),
        Lines(text, text, text, (Series(text, np.arange(2), np.arange(2)),), text, text, marks=((1, text),)),
        Samples(text, text, text, np.zeros((2, 3, 4)), 0.3, text),
        Intervals(
            text,
            text,
            text,
            (Estimate(text, 1.0, 0.0, 2.0, 0.5, note=text, group=text),),
            text,
            text,
            0.0,
            *[text] * 3,
        ),
        Timeline(
            text,
            text,
            text,
            (Life(text, 0, 2, 0.5, (Event(1, text, text),), note=text, group=text),),
            4,
            text,
        ),
    ]
    figures[text].append(_picture_map(text))
    document["verdict"]["lines"] = [{"analyzer": text, "title": text, "text": text}]
    rows = [
        dict.fromkeys(("model", "title", "published", "here", "source", "url", "where", "status_words"), text)
    ]
    document["references"] = {"match": text, "rows": [rows[0] | {"differences": [text]}]}
    document["findings"][text]["labels"] = {text: text}
    document["findings"][text]["title"] = text
    tiles = [Tile(text, text, text, link=text), Tile(text, text, text, applicable=False)]
    methods = [poison(method) | {"formula_mathml": text} for method in run.methods]
    return factory.Run(document, figures, tiles, poison(run.prompts), methods)
