"""Names of models: aliases for the hub, bundled checkpoints, folders, hub ids, and what to say about other names."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.suggest import did_you_mean

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
BUNDLED = "bundled:"


@dataclass(frozen=True)
class Entry:
    """One line of `sinklens ls models`: `name` opens `target`."""

    name: str
    target: str
    about: str


@dataclass(frozen=True)
class Source:
    """Where a model is.

    Attributes:
        id: How the model is called in results: `org/name`, `bundled:name`, or the folder as given.
        location: What transformers is given: `org/name` or a folder.
        revision: Branch, tag or commit as asked for; None for folders.
        folder: The folder, if the model is on this disk by choice.
        alias: The alias that was used, if any.
    """

    id: str
    location: str
    revision: str | None = None
    folder: Path | None = None
    alias: str | None = None


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "aliases.toml").read_text(encoding="utf-8"))


@cache
def aliases() -> dict[str, Entry]:
    """Alias to entry."""
    sections = ((about, table) for about, table in _file().items() if isinstance(table, dict))
    return {name: Entry(name, target, about) for about, table in sections for name, target in table.items()}


def bundled() -> dict[str, Path]:
    """Name to folder of the checkpoints that come with the package."""
    folders = sorted(path.parent for path in CHECKPOINTS.glob("*/config.json"))
    return {folder.name: folder for folder in folders}


def default_model() -> str:
    """The checkpoint that is opened when no model is named."""
    name, known = str(_file().get("default", "")), bundled()
    if name not in known and not known:
        raise ModelError("No checkpoint came with this installation.", hint="Name a model: --model org/name")
    return f"{BUNDLED}{name if name in known else next(iter(known))}"


def list_models() -> list[Entry]:
    """Bundled checkpoints, then aliases."""
    own = [Entry(f"{BUNDLED}{name}", "in this package", _card(folder)) for name, folder in bundled().items()]
    return [*own, *aliases().values()]


def _card(folder: Path) -> str:
    """The first sentence of a checkpoint's card below its title."""
    card = folder / "card.md"
    lines = card.read_text(encoding="utf-8").splitlines() if card.is_file() else []
    return next((line.strip() for line in lines if line.strip() and not line.startswith(("#", "---"))), "")


def locate(spec: str | os.PathLike[str] | None, revision: str | None = None) -> Source:
    """Finds what a name means; opens nothing.

    Args:
        spec: None for the default bundled checkpoint, `bundled:name`, a folder, an alias or `org/name`; the last
            two may end in `@revision`.
        revision: The same as `@revision`.

    Raises:
        ModelError: No such model; near names are suggested.
        UsageError: Two different revisions, or one for a folder.
    """
    if spec is None:
        spec = default_model()
    text = os.fspath(spec)
    if not text.strip():
        raise ModelError("The model's name is empty.", hint="Leave --model out for the bundled checkpoint.")
    if text.startswith(BUNDLED):
        return _bundled(text, revision)
    folder = Path(text).expanduser()
    if (
        isinstance(spec, os.PathLike)
        or text.startswith((".", "/", "~", os.sep))
        or (folder / "config.json").is_file()
    ):
        return _folder(text, folder, revision)
    name, _, pinned = text.partition("@")
    if pinned and revision and pinned != revision:
        raise UsageError(f"Two revisions were given for {name!r}: {pinned!r} and {revision!r}.")
    wanted = pinned or revision or None
    known = aliases()
    if name.lower() in known:
        target = known[name.lower()].target
        return Source(target, target, wanted, alias=name.lower())
    if name in bundled():
        return _bundled(f"{BUNDLED}{name}", wanted)
    if name.count("/") == 1 and all(name.split("/")):
        if folder.is_dir():
            return _folder(text, folder, revision)
        return Source(name, name, wanted)
    raise _unknown(text, folder)


def _unknown(text: str, folder: Path) -> ModelError:
    wanted = text.rpartition("/")[2].partition("@")[0].lower()
    known = [*aliases(), *(f"{BUNDLED}{name}" for name in bundled())]
    longer = [name for name in known if wanted and wanted in name]  # qwen3-30b: the whole of what was typed
    detail = did_you_mean(wanted, longer if 0 < len(longer) <= 3 else known)
    if folder.is_dir():
        detail = f"The folder {text!r} exists but has no config.json."
    return ModelError(
        f"Cannot find model {text!r}: it is no alias, no folder and no org/name of the hub.",
        detail=detail,
        hint="See: sinklens ls models",
    )


def _bundled(text: str, revision: str | None) -> Source:
    name, known = text.removeprefix(BUNDLED), bundled()
    if name not in known:
        raise ModelError(
            f"There is no bundled checkpoint {name!r}.",
            detail=did_you_mean(name, known) or f"Bundled are: {', '.join(known) or 'none'}.",
            hint="See: sinklens ls models",
        )
    _no_revision(text, revision)
    return Source(text, str(known[name]), folder=known[name])


def _folder(text: str, folder: Path, revision: str | None) -> Source:
    if folder.is_file():
        raise ModelError(
            f"{text!r} is a file, not a model folder.",
            hint=f"Give the folder that holds it and config.json: {str(folder.parent)!r}",
        )
    if not folder.is_dir():
        raise ModelError(f"There is no folder {text!r}.", hint="Check the path, or give org/name of the hub.")
    _no_revision(text, revision)
    return Source(text, str(folder), folder=folder)


def _no_revision(text: str, revision: str | None) -> None:
    if revision:
        raise UsageError(f"{text!r} is on this disk and has no revisions, but {revision!r} was asked for.")
