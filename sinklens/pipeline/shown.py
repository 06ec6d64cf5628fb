"""What a run shows in a notebook: its findings with their figures, its prompts, and its pictures with their patches."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from sinklens.analyzers.base import Finding
from sinklens.analyzers.pictures import page
from sinklens.core.card import card
from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.figures import Figure
from sinklens.core.pictures import PictureMap, PicturePage, Quantity
from sinklens.core.suggest import did_you_mean
from sinklens.tracers import signals as sig
from sinklens.tracers.trace import PromptRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure as Drawn

    from .run import Run

_MOST_BYTES = 70_000


@dataclass(frozen=True)
class Shown:
    """Static HTML for a notebook, and the same in a sentence."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


@dataclass
class RunFinding(Finding):
    """A finding as its run hands it out: it draws itself, with the run's pictures."""

    _pictures: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, finding: Finding, pictures: dict[str, np.ndarray]) -> RunFinding:
        return cls(**vars(finding), _pictures=pictures)

    def __repr__(self) -> str:
        return super().__repr__()

    def plot(self, figure: str | int = 0, *, picture: int = 0) -> go.Figure:
        """One of its figures as plotly draws it, to look around in.

        Args:
            figure: Its key, or its place among the figures.
            picture: Of figures with pictures, which one by its place.

        Raises:
            UsageError: There is no such figure.
        """
        from sinklens.report import interactive

        return interactive(self._figure(figure), page=picture, pictures=self._pictures)

    def draw(self, figure: str | int = 0, *, picture: int = 0, **size: float) -> Drawn:
        """One of its figures as matplotlib draws it, for a paper; `sinklens.export` writes all of them.

        Args:
            figure, picture: As in `plot`.
            size: `width` and `height` in inches.

        Raises:
            UsageError: There is no such figure.
        """
        from sinklens.report import draw

        return draw(self._figure(figure), page=picture, pictures=self._pictures, **size)

    def _figure(self, wanted: str | int) -> Figure:
        if not self.figures:
            raise UsageError(f"{self.title} has nothing to draw.", detail=self.verdict)
        keys = [figure.key for figure in self.figures]
        if isinstance(wanted, str) and wanted in keys:
            return self.figures[keys.index(wanted)]
        if isinstance(wanted, int) and -len(keys) <= wanted < len(keys):
            return self.figures[wanted]
        detail = (isinstance(wanted, str) and did_you_mean(wanted, keys)) or f"It has: {', '.join(keys)}."
        raise UsageError(f"{self.title} has no figure {wanted!r}.", detail=detail)

    def _repr_html_(self) -> str:
        return card(self.title, self.verdict, self.notes, self.rows, self.units, below=self._drawn())

    def _drawn(self) -> str:
        """The first figure: of pictures the maps, of others an image; nothing if it would be too large."""
        if not self.figures:
            return ""
        first = self.figures[0]
        if isinstance(first, PictureMap):
            from sinklens.report.notebook_pictures import picture_html

            made = picture_html(first, 0, self._pictures) if first.pages else ""
        else:
            held = io.BytesIO()
            self.draw(0, width=5.2).savefig(held, format="png", dpi=96, facecolor="white")
            source = base64.b64encode(held.getvalue()).decode("ascii")
            style = "display:block;max-width:100%;margin-top:6px"
            made = f'<img alt="{escape(first.title)}" style="{style}" src="data:image/png;base64,{source}">'
        return made if len(made) <= _MOST_BYTES else ""


def show_picture(run: Run, prompt: int, image: int, finding: str | None) -> Shown:
    """A picture of a prompt with what a finding says of its patches; see `Run.picture`."""
    from sinklens.report.notebook_pictures import picture_html

    record = _record(run, prompt)
    count = len(record.spans.pictures) if record.spans is not None else 0
    if not 0 <= image < count:
        have = f"It has {count}, counted from 0." if count else "It is text alone."
        raise UsageError(f"Prompt {prompt} has no picture {image}.", detail=have)
    figure, place = _map(run, record, image, finding)
    page_ = figure.pages[place]
    text = f"{figure.title}: prompt {prompt}, picture {image}. {page_.sentence}".rstrip()
    return Shown(picture_html(figure, place, run.pictures), text)


def show_prompt(run: Run, prompt: int) -> Shown:
    """The tokens of a prompt with the attention they receive, and its pictures; see `Run.view`."""
    from sinklens.report.notebook_pictures import prompt_html

    record = _record(run, prompt)
    weights = received(record)
    said = "Attention was not recorded."
    if weights is not None:
        said = "Darker: more attention received, per query that sees the token, mean over layers and heads."
    pictures = range(len(record.spans.pictures)) if record.spans is not None else ()
    below = [_map(run, record, image, None) for image in pictures]
    visual = record.spans.visual.tolist() if record.spans is not None else [False] * len(record)
    title = f"Prompt {record.index}, {record.source}: {counted(len(record), 'token')}"
    known = None if weights is None else weights.tolist()
    return Shown(prompt_html(title, record.pieces, known, visual, said, below, run.pictures), title)


def received(record: PromptRecord) -> np.ndarray | None:
    """Attention received per visible query by position, mean over layers that have attention, and heads."""
    if sig.ATTENTION_RECEIVED_MEAN.name not in record.arrays:
        return None
    values = record[sig.ATTENTION_RECEIVED_MEAN].astype(np.float64)
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)


def _record(run: Run, prompt: int) -> PromptRecord:
    for record in run.trace:
        if record.index == prompt:
            return record
    indices = [record.index for record in run.trace]
    have = f"It has {len(indices)}: {indices[0]} to {indices[-1]}." if indices else "It has none."
    raise UsageError(f"The run has no prompt {prompt}.", detail=have)


def _map(run: Run, record: PromptRecord, image: int, finding: str | None) -> tuple[PictureMap, int]:
    """The figure that shows this picture and the place of its page: of a finding, else of the attention received."""
    known = {
        name: [(figure, place) for figure in found.figures if isinstance(figure, PictureMap)
               for place in [_place(figure, record.index, image)] if place is not None]
        for name, found in run.findings.items()
    }  # fmt: skip
    if finding is not None:
        name = finding.replace("_", "-")
        if not known.get(name):
            drawn = [key for key, found in known.items() if found]
            detail = did_you_mean(name, drawn) or f"Drawn by: {', '.join(drawn) or 'no finding'}."
            raise UsageError(f"{finding!r} draws nothing on this picture.", detail=detail)
        return known[name][0]
    return next((found[0] for found in known.values() if found), (_plain(record, image), 0))


def _place(figure: PictureMap, prompt: int, image: int) -> int | None:
    places = ((page_.ref.prompt, page_.ref.picture) for page_ in figure.pages)
    return next((i for i, place in enumerate(places) if place == (prompt, image)), None)


def _plain(record: PromptRecord, image: int) -> PictureMap:
    """The patches alone, with the attention they receive if it was recorded."""
    weights = received(record)
    built: PicturePage = page(record, image, [] if weights is None else [weights])
    quantity = Quantity("received", "Attention received", "share")
    caption = "Attention received by each patch per query that sees it, mean over layers and heads."
    return PictureMap(
        "patches",
        "Patches",
        caption if weights is not None else "Attention was not recorded.",
        (built,),
        () if weights is None else (quantity,),
    )
