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


_SPACED = set("=+−-·×<>≤≥≠≈∝∧∨∈→⇒")
_BARS = ("|", "‖")


def linear(source: str) -> str:
    """A formula in one line of plain text: `Sink_k^ε = 100 · mean_(prompts) [α_k > ε]`.

    For documents that cannot show MathML; what is not MathML stays as it is.
    """
    try:
        root = ET.fromstring(source)
    except ET.ParseError:
        return source
    return re.sub(r" ([,;])", r"\1", " ".join(_linear(root).split()))


def _linear(node: ET.Element) -> str:
    name = node.tag.removeprefix("{http://www.w3.org/1998/Math/MathML}")
    parts = [_linear(child) for child in node]
    if name in ("mi", "mn", "mtext", "ms"):
        return "".join(node.itertext())
    if name == "mo":
        sign = "".join(node.itertext()).strip()
        return f" {sign} " if sign in _SPACED else f"{sign} " if sign in (",", ";") else sign
    if name == "mspace":
        return " "
    if name == "mfrac":
        return f"{_grouped(parts[0])} / {_grouped(parts[1])}"
    if name in ("msub", "munder"):
        return f"{_joined(node, parts[0])}_{_grouped(parts[1])}{_after(node)}"
    if name in ("msup", "mover"):
        return f"{parts[0]}{parts[1] if parts[1] == '′' else '^' + _grouped(parts[1])}"
    if name in ("msubsup", "munderover"):
        return f"{parts[0]}_{_grouped(parts[1])}^{_grouped(parts[2])}{_after(node)}"
    if name in ("msqrt", "mroot"):
        return f"√({''.join(parts)})"
    return "".join(_apart(parts))


def _joined(node: ET.Element, base: str) -> str:
    return base.strip() if node.tag.endswith("munder") else base


def _after(node: ET.Element) -> str:
    """Operators with something below them (a mean, a sum) stand apart from what they act on."""
    return " " if node.tag.endswith(("munder", "munderover")) else ""


def _grouped(part: str) -> str:
    """A part in brackets unless it is one word or one bracketed or indexed term."""
    inner = part.strip()
    simple = re.fullmatch(r"[^\s(),/]+(_[^\s(),]+|_\([^()]*\))?|[\w√]+\([^()]*\)|‖[^‖]+‖", inner)
    return inner if simple else f"({inner})"


def _apart(parts: list[str]) -> list[str]:
    """Terms that multiply each other get a space between them, brackets, bars and signs none."""
    shown: list[str] = []
    opened: dict[str, bool] = dict.fromkeys(_BARS, False)
    for part in parts:
        before = shown[-1][-1:] if shown else ""
        closing = opened.get(part, False)
        ended = before.isalnum() or (before in ")]′‖|" and not opened.get(before, False))
        begins = part[:1].isalnum() or part[:1] == "∑" or (part in _BARS and not closing)
        shown.append((" " if before and ended and begins else "") + part)
        if part in _BARS:
            opened[part] = not closing
    return shown
