"""Figures as data. A finding says *what* is to be drawn; the report and the paper figures decide how.

Every figure carries its reduction in words (`caption`), because a map whose averaging is unknown cannot be
reproduced. Layers, heads, positions and dims are 0-based everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Heatmap:
    """A matrix, for instance layer by head. NaN means "no value here" and is drawn hatched.

    Attributes:
        key: Stable name within the finding, used in links.
        values: `[y, x]`.
        unit: `share`, `nats`, `L2 norm`, `abs-max`, `ratio to median`, ...
        marks: Cells `(y, x)` to ring, for instance the Super Experts.
        log: Colour by the logarithm.
        limits: Colour limits, or None for robust ones.
    """

    key: str
    title: str
    caption: str
    values: np.ndarray
    unit: str
    y_label: str = "layer"
    x_label: str = "head"
    marks: tuple[tuple[int, int], ...] = ()
    log: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One line: `x` and `y` of equal length; NaN in `y` breaks the line."""

    name: str
    x: np.ndarray
    y: np.ndarray
    emphasis: bool = False


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis, for instance norm by layer.

    `marks` are labelled vertical lines `(x, label)`.
    """

    key: str
    title: str
    caption: str
    series: tuple[Series, ...]
    x_label: str
    y_label: str
    log_y: bool = False
    marks: tuple[tuple[float, str], ...] = ()
    bars: bool = False


@dataclass(frozen=True)
class Samples:
    """Per-prompt values behind a thresholded rate, so that a reader can move the threshold.

    Attributes:
        values: `[prompt, layer, head]`; the rate is the mean of `values > threshold`, in percent.
        threshold: The one the finding used.
    """

    key: str
    title: str
    caption: str
    values: np.ndarray
    threshold: float
    unit: str = "share"


Figure = Heatmap | Lines | Samples


@dataclass(frozen=True)
class Tile:
    """One box of the first screen: a question's answer in a few characters, or why there is none."""

    label: str
    value: str
    note: str = ""
    applicable: bool = True
    link: str = field(default="")
