"""Two colour ramps, safe for colour-blind readers, and the scale from values to their levels.

The sequential ramp runs from deep blue over teal to pale yellow with evenly growing lightness, so that it also reads
in grey. On a dark page low values are dark; on a light page the ramp is turned round: low is always near
the page. Values of both signs get the diverging ramp, blue below zero and orange above it: its middle is the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from .png import RGB

LEVELS = 64

# OKLCH: lightness, chroma, hue in degrees, evenly spaced from dark to bright.
_CONTROL = (
    (0.25, 0.075, 272),
    (0.425, 0.095, 250),
    (0.60, 0.095, 210),
    (0.785, 0.105, 152),
    (0.965, 0.055, 105),
)

# The same for values of both signs, from the lowest over zero to the highest.
_DIVERGING_LIGHT = (
    (0.40, 0.115, 255),
    (0.66, 0.10, 245),
    (0.975, 0.004, 90),
    (0.71, 0.125, 60),
    (0.44, 0.115, 45),
)
_DIVERGING_DARK = (
    (0.86, 0.085, 235),
    (0.60, 0.10, 245),
    (0.25, 0.008, 255),
    (0.60, 0.12, 55),
    (0.86, 0.105, 75),
)


def _srgb(lightness: float, a: float, b: float) -> RGB:
    """OKLab to 8-bit sRGB; matrices from B. Ottosson, "A perceptual color space" (2020)."""
    cone = (
        (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3,
        (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3,
        (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3,
    )
    linear = (
        4.0767416621 * cone[0] - 3.3077115913 * cone[1] + 0.2309699292 * cone[2],
        -1.2684380046 * cone[0] + 2.6097574011 * cone[1] - 0.3413193965 * cone[2],
        -0.0041960863 * cone[0] - 0.7034186147 * cone[1] + 1.7076147010 * cone[2],
    )
    channels = (
        12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (max(c, 0.0) for c in linear)
    )
    red, green, blue = (round(255 * min(c, 1.0)) for c in channels)
    return red, green, blue


@cache
def ramp(n: int = LEVELS, *, light: bool = False) -> tuple[RGB, ...]:
    """`n` colours from low to high, for a dark page, or reversed for a light one."""
    colours = _between(_CONTROL, n)
    return colours[::-1] if light else colours


@cache
def diverging(n: int = LEVELS, *, light: bool = False) -> tuple[RGB, ...]:
    """`n` colours from the lowest value over zero to the highest."""
    return _between(_DIVERGING_LIGHT if light else _DIVERGING_DARK, n)


def _between(points: tuple[tuple[float, float, float], ...], n: int) -> tuple[RGB, ...]:
    """Colours at even steps between control points, mixed in OKLab."""
    control = np.array(
        [(li, c * math.cos(math.radians(h)), c * math.sin(math.radians(h))) for li, c, h in points]
    )
    at = np.linspace(0, len(control) - 1, n)
    lab = [np.interp(at, np.arange(len(control)), control[:, i]) for i in range(3)]
    return tuple(_srgb(float(li), float(a), float(b)) for li, a, b in zip(*lab, strict=True))


def hexadecimal(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def stylesheet() -> str:
    """CSS classes `q0` to `q63` and, for values of both signs, `d0` to `d63`, in the colours of both themes."""
    ramps = (("q", ramp(light=True), ramp()), ("d", diverging(light=True), diverging()))
    return "".join(
        f".{name}{i}{{fill:{hexadecimal(on_light)};"
        f"fill:light-dark({hexadecimal(on_light)},{hexadecimal(on_dark)})}}"
        for name, light, dark in ramps
        for i, (on_light, on_dark) in enumerate(zip(light, dark, strict=True))
    )


@dataclass(frozen=True)
class Scale:
    """How values become levels.

    Attributes:
        low: The value of the first level (and of everything below).
        high: The value of the last level.
        log: Whether levels are even in the logarithm.
        clipped: Whether values above `high` exist (or, with both signs, below `low`).
        signed: Values of both signs, zero in the middle.
    """

    low: float
    high: float
    log: bool = False
    clipped: bool = False
    signed: bool = False

    @property
    def name(self) -> str:
        """The letter of the ramp's CSS classes."""
        return "d" if self.signed else "q"

    def colours(self, *, light: bool) -> tuple[RGB, ...]:
        return diverging(light=light) if self.signed else ramp(light=light)

    def levels(self, values: Float[np.ndarray, "y x"]) -> Int[np.ndarray, "y x"]:
        """Levels 0 to `LEVELS - 1`, and -1 where there is no value."""
        known = np.isfinite(values)
        filled = np.where(known, values, self.low)
        if self.log:
            filled = np.log(np.maximum(filled, self.low))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        span = high - low
        part = (filled - low) / span if span > 0 else np.zeros_like(filled)
        found = np.clip(np.floor(part * LEVELS), 0, LEVELS - 1).astype(int)
        return np.where(known, found, -1)

    def at(self, part: float) -> float:
        """The value at this part (0 to 1) of the ramp."""
        if self.log:
            return math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))
        return self.low + part * (self.high - self.low)


def scale(values: np.ndarray, *, log: bool = False, limits: tuple[float, float] | None = None) -> Scale:
    """The given limits, or robust ones: a few extreme values must not wash out the rest.

    Limits that are even about zero ask for the ramp of values of both signs.

    Without limits a linear scale starts at zero when all values are non-negative and ends at the largest
    value or at three times the root mean square, whichever is smaller; with values of both signs it does so on
    either side of zero. A logarithmic one spans the positive values.
    """
    known = values[np.isfinite(values)].astype(float)
    if log:
        known = known[known > 0]
    if limits is not None and not (log and limits[0] <= 0):
        low, high = float(limits[0]), float(limits[1])
        if low == -high != 0:
            return Scale(low, high, clipped=bool(known.size and np.abs(known).max() > high), signed=True)
    elif not known.size:
        low, high = (1.0, 1.0) if log else (0.0, 0.0)
    elif log:
        low, high = float(known.min()), float(known.max())
    else:
        robust = 3 * float(np.sqrt(np.mean(np.square(known, dtype=float))))
        largest = float(np.abs(known).max())
        if known.min() < 0 < known.max():
            high = min(largest, robust)
            return Scale(-high, high, clipped=largest > high * (1 + 1e-9), signed=True)
        low = 0.0 if known.min() >= 0 else float(np.percentile(known, 1))
        high = min(float(known.max()), robust if low == 0.0 else float(np.percentile(known, 99)))
    return Scale(low, high, log, bool(known.size and known.max() > high * (1 + 1e-9)))
