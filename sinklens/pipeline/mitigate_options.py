"""What a mitigate run is asked to do, as data that goes into its folder and comes back on resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sinklens.core.canonical import plain
from sinklens.core.errors import DataError, UsageError
from sinklens.evaluation.tasks import Task
from sinklens.mitigations import Method
from sinklens.mitigations.recipes import Recipe, load_recipe

from .mass_ledger import with_ledger
from .options import ProfileOptions

ANALYZERS = ("primary-sinks", "massive-activations")
"""What is measured without and with each mitigation unless analyzers are named."""

MOST_CONTROLS = 50


@dataclass(frozen=True)
class MitigateOptions:
    """Everything but the model.

    The mass ledger is always among the analyzers.

    Attributes:
        methods: Methods, or their command-line forms.
        recipes: Recipes, or files of such.
        tasks: Tasks, or their names; none takes the first that is made for the model, or perplexity.
        calibrate: Choose the methods' parameters on a part of the first task, and report on the rest.
        calibration: A task of its own to choose on; the first task is then reported whole.
        calibration_items, report_items: Sizes of the parts; a calibration size below 1 is a share.
        n_items: Items of each task before it is split.
        controls: Random draws per control of a structural method (pruning, protection); 0 leaves controls out.
        search: Settings of the searches (`objective`, `units`, `keep`, ...); each takes those it has.
        profile: Prompts, analyzers and loading of the model, as of `profile`.
    """

    methods: tuple[Method | str, ...] = ()
    recipes: tuple[Recipe | str, ...] = ()
    tasks: tuple[Task | str, ...] = ()
    calibrate: bool = False
    calibration: Task | str | None = None
    calibration_items: float = 0.4
    report_items: int | None = None
    n_items: int | None = None
    controls: int = 2
    search: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    profile: ProfileOptions = field(default_factory=lambda: ProfileOptions(analyzers=ANALYZERS, verify=False))

    def __post_init__(self) -> None:
        named = with_ledger(self.profile.analyzers)
        if named != self.profile.analyzers:
            object.__setattr__(self, "profile", replace(self.profile, analyzers=named))
        if not self.methods and not self.recipes:
            raise UsageError(
                "No mitigation was named.",
                hint="Try: --with zero-tuning,act --calibrate, or --recipe FILE. See: sinklens ls mitigations",
            )
        for name in ("report_items", "n_items"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 2, got {value}.")

        if not 0 <= self.controls <= MOST_CONTROLS:
            raise UsageError(f"--controls must be from 0 to {MOST_CONTROLS}, got {self.controls}.")

    @property
    def in_memory(self) -> list[str]:
        """What was given as objects, which no file can bring back."""
        given = [*self.methods, *self.tasks, self.calibration]
        kinds = [type(item).__name__ for item in given if item is not None and not isinstance(item, str)]
        return kinds

    def request(self, model: str | None) -> dict[str, Any]:
        """As JSON. Recipes are stored whole: their files may be gone on resume."""
        recipes = [
            recipe.to_json() if isinstance(recipe, Recipe) else load_recipe(recipe).to_json()
            for recipe in self.recipes
        ]
        found = {
            "model": model,
            "in_memory": self.in_memory,
            "methods": [item for item in self.methods if isinstance(item, str)],
            "tasks": [item for item in self.tasks if isinstance(item, str)],
            "calibration": self.calibration if isinstance(self.calibration, str) else None,
            "recipes": recipes,
            "search": dict(self.search),
            "profile": self.profile.request(),
        }
        for name in ("calibrate", "calibration_items", "report_items", "n_items", "controls", "seed"):
            found[name] = getattr(self, name)
        result = plain(found)
        assert isinstance(result, dict)
        return result


def stored_options(path: Path) -> tuple[str | None, MitigateOptions]:
    """Model and options of an interrupted run.

    Raises:
        DataError: The folder has none.
        UsageError: It was started from objects in memory.
    """
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path.parent} is not a folder of `sinklens mitigate`: it has no readable {path.name}.",
            hint="Profile runs go on with: sinklens profile --resume FOLDER",
        ) from error
    profile = dict(request.pop("profile"))
    model, given = request.pop("model"), request.pop("in_memory")
    if given or "prompts_given" in profile:
        raise UsageError(
            f"The run in {path.parent} was started from objects in memory ({', '.join(given) or 'prompts'}).",
            hint="Start it again from Python.",
        )
    profile["analyzers"] = tuple(profile["analyzers"])
    recipes = tuple(
        Recipe(**{k: v for k, v in recipe.items() if k in Recipe.__dataclass_fields__})
        for recipe in request.pop("recipes")
    )
    tuples = {key: tuple(request.pop(key)) for key in ("methods", "tasks")}
    return model, MitigateOptions(recipes=recipes, profile=ProfileOptions(**profile), **tuples, **request)
