"""What a calibration chose, as a file: one line puts it on the model it was chosen for, and on no other.

with sl.recipe("zero-tuning.json")(model) as effect:
    model.generate(**inputs)
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from sinklens.core.canonical import dumps, plain
from sinklens.core.errors import DataError, ModelError
from sinklens.core.manifest import package_version
from sinklens.models.fingerprint import fingerprint
from sinklens.models.spec import OpenedModel

from .effect import Outcome
from .method import Method, registry

SCHEMA = "sinklens/recipe/1"


@dataclass(frozen=True)
class Recipe:
    """A method with its parameters, and where they come from.

    Attributes:
        parameters: Of the method, values per head included.
        model: Fingerprint of the model it was chosen for, with its `id` and `revision`.
        calibration: `task, n, seed, sha256` and the `items`' content hashes; empty if nothing was calibrated.
        searched: What was tried.
        scores: On the calibration items: `unchanged` and `chosen`.
        text: One sentence on the choice.
    """

    method: str
    parameters: dict[str, Any]
    model: dict[str, Any]
    calibration: dict[str, Any] = field(default_factory=dict)
    searched: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    sinklens: str | None = None

    @property
    def mitigation(self) -> Method:
        """The method, ready to be put on a model.

        Raises:
            DataError: The parameters are not those of the method.
        """
        cls = registry[self.method]
        try:
            return cls(**{key: _tuples(value) for key, value in self.parameters.items()})
        except (TypeError, KeyError) as error:
            raise DataError(
                f"The recipe's parameters are not those of {self.method}: {error}.",
                hint="It may come from another version; calibrate again.",
            ) from error

    def check(self, model: nn.Module | OpenedModel) -> None:
        """Refuse another model than the one it was chosen for.

        Raises:
            ModelError: Naming what differs.
        """
        found = fingerprint(model)
        differs = [key for key, value in found.items() if key in self.model and self.model[key] != value]
        if not differs:
            return
        name = self.model.get("id") or "another model"
        if differs == ["weights"]:
            detail = "It has the same shape and other weights: another checkpoint, or the same one trained further."
        else:
            told = [
                f"{key} {self.model[key]} there, {found[key]} here" for key in differs if key != "weights"
            ]
            detail = f"They differ: {'; '.join(told)}."
        raise ModelError(
            f"This recipe was chosen for {name}, not for this model.",
            detail=detail,
            hint="Calibrate on this model: sinklens mitigate -m MODEL --with "
            f"{self.method} --task TASK --calibrate",
        )

    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Outcome]:
        """Put it on the model it was chosen for.

        Raises:
            ModelError: It was chosen for another one.
        """
        self.check(model)
        return self.mitigation(model)

    def to_json(self) -> dict[str, Any]:
        found = plain({"schema": SCHEMA, **asdict(self)})
        assert isinstance(found, dict)
        return found

    def save(self, path: str | Path) -> Path:
        target = Path(path)
        target.write_text(dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return target


def recipe_for(method: Method, opened: OpenedModel, *, id: str | None = None, **parts: Any) -> Recipe:
    """A recipe of a method for a model."""
    model = {"id": id or opened.info.id, "revision": opened.info.revision, **fingerprint(opened)}
    if Path(str(model["id"])).is_absolute():
        model["id"] = Path(str(model["id"])).name
    return Recipe(method.name, method.parameters, model, sinklens=package_version("sinklens"), **parts)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        DataError: It is no recipe, or of another version.
    """
    place = Path(path)
    try:
        data = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The recipe {place.name!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{place.name!r} is not a recipe: it is not JSON.") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise DataError(
            f"{place.name!r} is not a recipe of this version: expected schema {SCHEMA!r}, found {found!r}."
        )
    known = Recipe.__dataclass_fields__
    recipe = Recipe(**{key: value for key, value in data.items() if key in known})
    _ = recipe.mitigation  # an unknown method or parameter is told now rather than in the middle of a run
    return recipe


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
