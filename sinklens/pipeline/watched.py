"""How far a run is, in a notebook: one line that is rewritten in place."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from sinklens.analyzers import Analyzer
from sinklens.core.counts import counted
from sinklens.core.stages import STAGES
from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers.selfcheck import Check

from .listener import Listener, Silent

MARK = {"sinklens": "progress"}
"""Metadata of the output, by which it is told from results."""
EVERY = 0.1
"""Seconds between two drawings."""
MOST = 100


@contextmanager
def watched(listener: Listener | None, progress: bool = True) -> Iterator[Listener]:
    """Who hears how far a run is: the caller's listener, in a notebook a line, elsewhere nobody."""
    if listener is not None or not progress or not in_notebook():
        yield listener or Silent()
        return
    line = NotebookLine()
    try:
        yield line
    except BaseException:
        line.end("stopped")
        raise
    line.end("done")


def in_notebook() -> bool:
    """Whether a kernel with a frontend runs this; nothing is imported to find out."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookLine:
    """A line with a bar under a cell; when the run ends, one short sentence stays of it."""

    def __init__(self) -> None:
        self._model = ""
        self._prompts = ""
        self._stage = "Opening the model"
        self._drawn = 0.0
        self._handle: Any = None
        self._show(self._stage)

    def opened(self, opened: OpenedModel) -> None:
        """The model is in memory."""
        self._model = opened.info.id
        self._begin("Profiling")

    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None:
        """It is known what will be run."""
        self._prompts = counted(prompts.description["n_prompts"], "prompt")
        self._begin(self._stage)

    def checked(self, checks: list[Check]) -> None:
        """The self-check is done; a failed one is an error, which says so."""

    def stage(self, name: str) -> None:
        """An experiment begins; its progress counts from 0 again."""
        self._begin(STAGES.get(name, name))

    def progress(self, done: int, total: int) -> None:
        """Some prompts (of an experiment: some passes) are finished."""
        now = time.monotonic()
        if done < total and now - self._drawn < EVERY:
            return
        self._drawn = now
        self._show(f"{self._named()}{_short(self._stage)}: {done} of {total}", done, total)

    def end(self, how: str) -> None:
        """Only one short line stays."""
        told = self._prompts if how == "done" else f"at: {_short(self._stage)}"
        self._show(f"{self._named() or 'sinklens: '}{how}{', ' if told else ''}{told}")

    def _begin(self, stage: str) -> None:
        self._stage, self._drawn = stage, 0.0
        self._show(f"{self._named()}{_short(stage)}")

    def _named(self) -> str:
        return f"{self._model}: " if self._model else ""

    def _show(self, text: str, done: int = 0, total: int = 0) -> None:
        from IPython.display import display

        bar = f'<progress value="{done}" max="{total}"></progress> ' if total else ""
        html = f'<div style="font-size:85%;opacity:.72">{bar}{escape(text)}</div>'
        data = {"text/plain": text, "text/html": html}
        if self._handle is None:
            self._handle = display(data, raw=True, metadata=MARK, display_id=True)
        else:
            self._handle.update(data, raw=True, metadata=MARK)


def _short(text: str) -> str:
    return text if len(text) <= MOST else text[: MOST - 1] + "…"
