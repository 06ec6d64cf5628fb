"""Formulas come as MathML text; only mathematics passes into the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from markupsafe import Markup, escape

from .text import visible

_INVISIBLE = ("\u2061", "\u2062", "\u2063", "\u2064")
_ELEMENTS = frozenset(
    """
    math mrow mi mn mo ms mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover
    mmultiscripts mprescripts none mtable mtr mtd mfenced mpadded mphantom menclose mstyle semantics
    """.split()  # noqa: SIM905
)
_ATTRIBUTES = frozenset(
    """
    display mathvariant stretchy fence separator form lspace rspace accent accentunder movablelimits largeop
    symmetric width height depth columnalign rowspacing columnspacing linethickness displaystyle scriptlevel
    open close separators dir
    """.split()  # noqa: SIM905
)


def formula(source: str) -> Markup:
    """The formula as markup if it is well-formed MathML of known elements, else as plain text."""
    if not source.strip():
        return Markup("")
    if "<!" in source or "<?" in source:  # no document types, entities or processing instructions
        return _as_text(source)
    try:
        root = ET.fromstring(source)
        return _element(root, outermost=True)
    except (ET.ParseError, ValueError):
        return _as_text(source)


def _as_text(source: str) -> Markup:
    return Markup("<code>{}</code>").format(visible(source))


def _text(text: str | None) -> Markup:
    """Text inside a formula; MathML's own invisible operators (times, function application, ...) stay."""
    parts = re.split("([\u2061-\u2064])", text or "")
    return Markup("").join(escape(part if part in _INVISIBLE else visible(part)) for part in parts)


def _element(node: ET.Element, *, outermost: bool = False) -> Markup:
    name = node.tag.removeprefix("{http://www.w3.org/1998/Math/MathML}")
    if name not in _ELEMENTS or (outermost and name != "math"):
        raise ValueError(f"<{name}> is not MathML")
    attributes = Markup("").join(
        Markup(' {}="{}"').format(key, visible(value))
        for key, value in node.attrib.items()
        if key in _ATTRIBUTES
    )
    body = [_text(node.text)]
    for child in node:
        body += [_element(child), _text(child.tail)]
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), attributes, Markup("").join(body))
