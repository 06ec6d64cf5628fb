"""Strings from models and users, made safe to look at: nothing invisible, nothing reordered.

Escaping for HTML is the template engine's task; this module is about what stays dangerous after escaping:
control characters, right-to-left overrides, zero-width characters, stacks of accents, and tokens as long as
a page.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_ACCENTS = 3


def visible(text: str) -> str:
    """The text with every invisible or direction-changing character spelled out, line ends and tabs kept.

    C0 controls become control pictures (␀), the others their escape (`\\u202e`).
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(char) for char in text)


def _spelled(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in _HIDDEN:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def token(text: str, limit: int = 80) -> str:
    """One token as it is shown: edge spaces as `·`, line ends as `↵`, tabs as `⇥`, cut at `limit` characters.

    The empty token is `∅`. A leading accent gets a carrier, and a stack of accents is cut after three, so
    that a token cannot draw over its neighbours.
    """
    if text == "":
        return "∅"
    cut = text if len(text) <= limit else text[:limit]
    body = visible(cut).replace("\n", "↵").replace("\t", "⇥")
    body = re.sub(r"^ +| +$", lambda spaces: "·" * len(spaces.group()), body)
    body = _unstack(body)
    return body if cut is text else f"{body}… (+{len(text) - limit})"


def _unstack(text: str) -> str:
    if text.isascii():
        return text
    shown, accents = [], 0
    for char in text:
        accents = accents + 1 if unicodedata.category(char) in ("Mn", "Me") else 0
        if accents <= _ACCENTS:
            shown.append(char)
    body = "".join(shown)
    return "◌" + body if unicodedata.category(body[0]).startswith("M") else body


def shorten(text: str, limit: int) -> str:
    """A label of at most `limit` characters."""
    clean = " ".join(visible(text).split())
    return clean if len(clean) <= limit else clean[: limit - 1].rstrip() + "…"


def finalize(value: Any) -> Any:
    """What the templates print for a value: `visible` for strings, nothing for None, Markup unchanged."""
    if value is None:
        return ""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return visible(value)


def prose(value: str) -> Markup:
    """A paragraph in which `names` between backticks are set as code."""
    parts = re.split(r"`([^`\n]+)`", value)
    shown = [
        Markup("<code>{}</code>").format(visible(p)) if i % 2 else escaped(p) for i, p in enumerate(parts)
    ]
    return Markup("").join(shown)


def slug(name: str) -> str:
    """A name as an HTML id: letters, digits, `-` and `_`; never empty."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "unnamed"


def web_link(url: Any) -> str | None:
    """The address if it is plain http(s) without spaces or quotes, else None (`javascript:` and friends)."""
    found = isinstance(url, str) and re.fullmatch(r"https?://[^\s\"'<>\\]+", url)
    return url if found else None


def repository_link(code: Any) -> str | None:
    """The address of a repository given as an address or as `owner/name`."""
    if isinstance(code, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", code, flags=re.ASCII):
        return f"https://github.com/{code}"
    return web_link(code)


def escaped(value: Any) -> Markup:
    """A value as HTML text, invisible characters spelled out; for markup made outside the templates."""
    return escape(finalize(value))
