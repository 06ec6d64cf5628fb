"""Numbers as people read them: few digits, a real minus sign, powers of ten, never a rounded lie.

The report's script repeats these rules (static/data.js), so that a value reads the same in a table and
under the pointer; tests hold the two against each other.
"""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MINUS = "\u2212"
_THIN = "\u202f"


def number(value: Any, digits: int = 3) -> str:
    """A number in `digits` significant digits; integers are never shortened.

    Args:
        value: An int, float, bool or None; anything else is returned as `str(value)`.
        digits: Significant digits of a fraction.
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return integer(value)
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else _MINUS + "∞"
    return _fraction(value, digits)


def brief(value: Any, digits: int = 3) -> str:
    """`number` without zeros at its end: for thresholds and ticks, which people chose round."""
    text = number(value, digits)
    mantissa, times, power = text.partition(" × ")
    if "." in mantissa and isinstance(value, float):
        mantissa = mantissa.rstrip("0").rstrip(".")
    return mantissa + times + power


def integer(value: int) -> str:
    """Digits in groups of three from five digits on: 12 345."""
    text = f"{abs(value):,}".replace(",", _THIN) if abs(value) >= 10_000 else str(abs(value))
    return (_MINUS if value < 0 else "") + text


def _fraction(value: float, digits: int) -> str:
    size = abs(value)
    if size == 0:
        return "0"
    sign = _MINUS if value < 0 else ""
    exact = Decimal(size)
    rounded = _rounded(exact, digits - 1 - exact.adjusted())
    exponent = rounded.adjusted()
    if exponent < -4 or exponent >= 7:
        mantissa = f"{rounded.scaleb(-exponent):.{digits - 1}f}"
        return f"{sign}{mantissa} × 10{str(exponent).translate(_SUPERSCRIPT)}"
    if exponent >= digits - 1:
        return sign + integer(int(_rounded(exact, 0)))
    return f"{sign}{_rounded(exact, digits - 1 - exponent):f}"


def _rounded(value: Decimal, decimals: int) -> Decimal:
    """Halves go up, as in the script: Python's own rounding to even would differ on exact halves."""
    return value.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)


def percent(value: float | None) -> str:
    """A percentage with one decimal; 99.97 stays apart from 100, and 0.004 from 0.

    Args:
        value: In percent, 0 to 100.
    """
    if value is None or not math.isfinite(value):
        return number(value)
    if value in (0.0, 100.0):
        return f"{value:.0f}"
    for decimals in (1, 2, 3):
        text = f"{_rounded(Decimal(value), decimals):f}"
        if float(text) not in (0.0, 100.0):
            return text.replace("-", _MINUS)
    return "> 99.999" if value > 50 else "< 0.001"


def duration(seconds: float) -> str:
    """Seconds as people say them: `0.42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{brief(float(seconds))} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n_bytes: float) -> str:
    """Bytes in binary units: `12.5 MiB`."""
    amount = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{brief(amount) if unit != 'B' else integer(round(amount))} {unit}"
        amount /= 1024
    return f"{brief(amount)} TiB"


def with_unit(value: Any, unit: str) -> str:
    """A value as a table cell of a column with this unit; percentages keep one decimal."""
    if unit.startswith("%") and isinstance(value, float):
        return percent(value)
    return number(value)
