"""Figures as data. A finding says *what* is to be drawn; the report and the paper figures decide how.

Every figure carries its reduction in words (`caption`), because a map whose averaging is unknown cannot be
reproduced. Layers, heads, positions and dims are 0-based everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from .pictures import PictureMap


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

    `marks` are labelled vertical lines `(x, label)`. Without `joined`, points stand alone: a scatter plot.
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
    joined: bool = True


@dataclass(frozen=True)
class Samples:
    """Per-prompt values behind a thresholded rate, so that a reader can move the threshold.

    Attributes:
        values: `[prompt, layer, head]`; the rate is the mean of `values > threshold`, in percent.
        threshold: The one the finding used.
        grid: Thresholds to choose from, ascending, the finding's own among them; None to take them from the values.
    """

    key: str
    title: str
    caption: str
    values: np.ndarray
    threshold: float
    unit: str = "share"
    grid: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """One row of `Intervals`: a value with its interval, and the same of a control. NaN is "not known".

    Attributes:
        note: A few words at the end of the row, for instance what the row means.
        group: Rows that follow each other with the same group stand under it as a heading.
    """

    label: str
    value: float
    low: float = math.nan
    high: float = math.nan
    control: float = math.nan
    control_low: float = math.nan
    control_high: float = math.nan
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class Intervals:
    """Values with intervals, one below the other, each beside its control: effects, sensitivities, comparisons.

    Attributes:
        x_label: Of the values, with the unit.
        interval: What the bars span, for instance `95 % bootstrap interval over prompts`.
        reference: Where "no effect" (or the unchanged run) lies, drawn as a line; None for none.
        control_label: Name of the hollow points; not shown if no row has a control.
    """

    key: str
    title: str
    caption: str
    rows: tuple[Estimate, ...]
    x_label: str
    interval: str = "95 % interval"
    reference: float | None = 0.0
    reference_label: str = "no change"
    value_label: str = "measured"
    control_label: str = "control"


@dataclass(frozen=True)
class Event:
    """Something that happens to a row of a `Timeline` at a layer.

    Attributes:
        kind: `rise` (written, grows), `fall` (erased, shrinks) or `mark` (anything else).
    """

    layer: int
    label: str
    kind: str = "mark"


@dataclass(frozen=True)
class Life:
    """One row of a `Timeline`: what exists from one layer to another, both included.

    Attributes:
        strength: 0 to 1, shown as the depth of colour; NaN for none.
        gaps: Layers in between where it does not exist.
        note: A few words at the end of the row.
        group: Rows that follow each other with the same group stand under it as a heading.
    """

    label: str
    start: int
    end: int
    strength: float = math.nan
    events: tuple[Event, ...] = ()
    gaps: tuple[int, ...] = ()
    note: str = ""
    group: str = ""


@dataclass(frozen=True)
class Timeline:
    """What lives in which layers: secondary sinks from birth to end, massive activations from writer to eraser.

    Attributes:
        layers: Number of layers of the model, the length of the axis.
        unit: Of the strengths, "" if there are none.
    """

    key: str
    title: str
    caption: str
    rows: tuple[Life, ...]
    layers: int
    unit: str = ""
    x_label: str = "layer"


Figure = Heatmap | Lines | Samples | Intervals | Timeline | PictureMap


@dataclass(frozen=True)
class Tile:
    """One box of the first screen: a question's answer in a few characters, or why there is none."""

    label: str
    value: str
    note: str = ""
    applicable: bool = True
    link: str = field(default="")
