"""Who hears how far a run is."""

from __future__ import annotations

from typing import Protocol

from sinklens.analyzers import Analyzer
from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers.selfcheck import Check


class Listener(Protocol):
    """Who wants to hear how far a run is; the command line draws it."""

    def opened(self, opened: OpenedModel) -> None: ...
    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None: ...
    def checked(self, checks: list[Check]) -> None: ...
    def stage(self, name: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...


class Silent:
    """Nobody listens."""

    def opened(self, opened: OpenedModel) -> None:
        """The model is in memory."""

    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None:
        """It is known what will be run."""

    def checked(self, checks: list[Check]) -> None:
        """The self-check is done."""

    def stage(self, name: str) -> None:
        """An experiment begins; its progress counts from 0 again."""

    def progress(self, done: int, total: int) -> None:
        """Some prompts (of an experiment: some passes) are finished."""
