"""The report without the prompts' text and pictures: for prompts that must not leave the machine.

Hashes, counts and positions stay. Token strings and ids go from rows, manifest and prompts; where a
sentence quotes a token, the quotation is replaced. Pictures go, and their names become hashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sinklens.core.adjustable import Adjustable
from sinklens.core.figures import Estimate, Figure, Intervals, Life, Lines, PictureMap, Tile, Timeline
from sinklens.core.pictures import PicturePage

_Row = TypeVar("_Row", Estimate, Life)

HIDDEN = "[text left out]"
_SECRET = re.compile(r"(?:^|_)(?:tokens?|token_ids?|pieces|prompt_text|prompt)$")
_QUOTED = re.compile(
    r"'((?:[^'\\]|\\.){1,200})'|\"((?:[^\"\\]|\\.){1,200})\"|[“‘]([^”’]{1,200})[”’]|`([^`]{1,200})`"
)


def _hide(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: HIDDEN if _secret(key, item) else _hide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(item) for item in value]
    return value


def _secret(key: Any, item: Any) -> bool:
    """Fields named after tokens when they hold text or ids; counts and shares of tokens stay."""
    if not isinstance(key, str) or not _SECRET.search(key):
        return False
    return isinstance(item, str | list | tuple | Mapping) or (item is not None and "token_id" in key)


def _token_texts(value: Any) -> Iterator[str]:
    """Every token text in a document, wherever it stands."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if _secret(key, item):
                yield from (str(part) for part in ([item] if isinstance(item, str | int) else item))
            else:
                yield from _token_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _token_texts(item)


def _spellings(token: str) -> Iterable[str]:
    return {token, token.strip(), repr(token)[1:-1], repr(token.strip())[1:-1]}


class Redactor:
    """Removes quotations of the tokens, and the names of the pictures, that occur in the rows and prompts."""

    def __init__(self, document: Mapping[str, Any], prompts: Sequence[Mapping[str, Any]]) -> None:
        found = {piece for prompt in prompts for piece in prompt.get("pieces") or ()}
        found |= set(_token_texts(document))
        self.tokens = {spelling for token in found for spelling in _spellings(token)} - {""}
        given = [p for prompt in prompts for p in (prompt.get("spans") or {}).get("pictures") or ()]
        self.names = {str(p["name"]): _hashed(str(p["sha256"])) for p in given if p.get("name")}
        # Short names without an ending might be words of a sentence; they are replaced only where they stand alone.
        spelled = sorted((name for name in self.names if len(name) > 3 or "." in name), key=len, reverse=True)
        self._named_pictures = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def sentence(self, text: str) -> str:
        """The text without names of pictures, quoted tokens, and a token after a final middle dot."""
        if text in self.names:
            return self.names[text]
        if self._named_pictures is not None:
            text = self._named_pictures.sub(lambda match: self.names[match.group()], text)

        def swap(match: re.Match[str]) -> str:
            inner = next(group for group in match.groups() if group is not None)
            return HIDDEN if inner in self.tokens or inner.strip() in self.tokens else match.group()

        shown = _QUOTED.sub(swap, text)
        head, mark, tail = shown.rpartition(" · ")
        return f"{head}{mark}{HIDDEN}" if mark and tail.strip() in self.tokens else shown

    def sentences(self, value: Any) -> Any:
        """All strings inside a value."""
        if isinstance(value, str):
            return self.sentence(value)
        if isinstance(value, Mapping):
            return {key: self.sentences(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.sentences(item) for item in value]
        return value

    def document(self, document: Mapping[str, Any]) -> dict[str, Any]:
        return self.sentences(_hide(_without_prompt_option(document)))

    def figure(self, figure: Figure) -> Figure:
        changed = replace(figure, title=self.sentence(figure.title), caption=self.sentence(figure.caption))
        if isinstance(changed, Lines):
            series = tuple(replace(s, name=self.sentence(s.name)) for s in changed.series)
            marks = tuple((x, self.sentence(label)) for x, label in changed.marks)
            changed = replace(changed, series=series, marks=marks)
        elif isinstance(changed, PictureMap):
            changed = replace(changed, pages=tuple(self._page(page) for page in changed.pages))
        elif isinstance(changed, Intervals):
            changed = replace(changed, rows=tuple(self._named(row) for row in changed.rows))
        elif isinstance(changed, Timeline):
            rows = tuple(self._named(row) for row in changed.rows)
            events = [tuple(replace(e, label=self.sentence(e.label)) for e in row.events) for row in rows]
            changed = replace(
                changed, rows=tuple(replace(r, events=e) for r, e in zip(rows, events, strict=True))
            )
        return changed

    def _page(self, page: PicturePage) -> PicturePage:
        ref = replace(page.ref, name=_hashed(page.ref.sha256))
        bars = tuple((self.sentence(name), value) for name, value in page.bars)
        return replace(page, ref=ref, sentence=self.sentence(page.sentence), bars=bars)

    def prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        """What stays of a prompt; a picture's name in its source becomes the hash."""
        kept = bare_prompt(prompt)
        return {**kept, "source": self.sentence(str(kept["source"] or ""))}

    def _named(self, row: _Row) -> _Row:
        words = {name: self.sentence(getattr(row, name)) for name in ("label", "note", "group")}
        return replace(row, **words)

    def adjustable(self, item: Adjustable) -> Adjustable:
        """Without the tokens that its sentences quote."""
        words = tuple(HIDDEN for _ in item.words)
        return replace(item, words=words, facts=self.sentences(item.facts))

    def tile(self, tile: Tile) -> Tile:
        return replace(tile, value=self.sentence(tile.value), note=self.sentence(tile.note))


def _hashed(sha256: str) -> str:
    return f"picture {sha256[:12]}"


def bare_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What stays of a prompt: its place, source, domain, length and hash."""
    return {key: prompt.get(key) for key in ("index", "source", "domain", "n_tokens", "sha256")}


def _without_prompt_option(document: Mapping[str, Any]) -> dict[str, Any]:
    """The command line may carry a prompt: `--prompt TEXT`."""
    manifest = dict(document.get("manifest") or {})
    for key, value in manifest.items():
        if isinstance(value, str):
            pattern = r"(--(?:prompt|text|images?)[= ])('[^']*'|\"[^\"]*\"|\S+)"
            manifest[key] = re.sub(pattern, lambda m: f"{m.group(1)}'{HIDDEN}'", value)
        elif isinstance(value, list) and all(isinstance(item, str) for item in value):
            manifest[key] = _hide_argument(value)
    return {**document, "manifest": manifest}


def _hide_argument(words: list[str]) -> list[str]:
    shown: list[str] = []
    for word in words:
        if shown and shown[-1] in ("--prompt", "--text", "--images", "--image"):
            word = HIDDEN
        shown.append(
            re.sub(r"^(--(?:prompt|text|images?)=).*", lambda m: m.group(1) + HIDDEN, word, flags=re.DOTALL)
        )
    return shown
