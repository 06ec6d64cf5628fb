"""One sequential colour ramp, safe for colour-blind readers, and the scale from values to its levels.

The ramp runs from deep blue over teal to pale yellow with evenly growing lightness, so that it also reads
in grey. On a dark page low values are dark; on a light page the ramp is turned round: low is always near
the page.
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
    control = np.array(
        [(li, c * math.cos(math.radians(h)), c * math.sin(math.radians(h))) for li, c, h in _CONTROL]
    )
    at = np.linspace(0, len(control) - 1, n)
    lab = [np.interp(at, np.arange(len(control)), control[:, i]) for i in range(3)]
    colours = tuple(_srgb(float(li), float(a), float(b)) for li, a, b in zip(*lab, strict=True))
    return colours[::-1] if light else colours


def hexadecimal(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def stylesheet() -> str:
    """CSS classes `q0` to `q63` that fill with the ramp's colours in both themes."""
    pairs = zip(ramp(light=True), ramp(), strict=True)
    return "".join(
        f".q{i}{{fill:{hexadecimal(on_light)};fill:light-dark({hexadecimal(on_light)},{hexadecimal(on_dark)})}}"
        for i, (on_light, on_dark) in enumerate(pairs)
    )


@dataclass(frozen=True)
class Scale:
    """How values become levels.

    Attributes:
        low: The value of the first level (and of everything below).
        high: The value of the last level.
        log: Whether levels are even in the logarithm.
        clipped: Whether values above `high` exist.
    """

    low: float
    high: float
    log: bool = False
    clipped: bool = False

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

    Without limits a linear scale starts at zero when all values are non-negative and ends at the largest
    value or at three times the root mean square, whichever is smaller; a logarithmic one spans the positive
    values.
    """
    known = values[np.isfinite(values)].astype(float)
    if log:
        known = known[known > 0]
    if limits is not None and not (log and limits[0] <= 0):
        low, high = float(limits[0]), float(limits[1])
    elif not known.size:
        low, high = (1.0, 1.0) if log else (0.0, 0.0)
    elif log:
        low, high = float(known.min()), float(known.max())
    else:
        low = 0.0 if known.min() >= 0 else float(np.percentile(known, 1))
        robust = (
            3 * float(np.sqrt(np.mean(np.square(known, dtype=float))))
            if low == 0.0
            else np.percentile(known, 99)
        )
        high = min(float(known.max()), float(robust))
    return Scale(low, high, log, bool(known.size and known.max() > high * (1 + 1e-9)))
