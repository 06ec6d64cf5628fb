"""What all pages share: templates, script, style, and how a page is written to disk."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path

import jinja2

from sinklens.core.errors import DataError

from . import colour, text

_HERE = Path(__file__).parent
_SCRIPTS = (
    "data",
    "maps",
    "samples",
    "thresholds",
    "epsilon",
    "tables",
    "tokens",
    "heads",
    "pictures",
    "page",
)


def write(path: str | os.PathLike[str], html: str) -> Path:
    """A page into a file; an older page stays until the new one is complete. Returns the path.

    Raises:
        DataError: The file cannot be written.
    """
    target = Path(path)
    unfinished = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(html, encoding="utf-8", newline="\n")
        os.replace(unfinished, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise DataError(
            f"Cannot write the report {str(target)!r}: {error.strerror}.",
            hint="Choose another place with --out.",
        ) from error
    return target


@cache
def template(name: str) -> jinja2.Template:
    """A page's template; everything it prints is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        finalize=text.finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@cache
def script() -> str:
    """The page's script: the files of `static/` in one function, so that nothing is global."""
    parts = [(_HERE / "static" / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";(() => {\n' + "\n".join(parts) + "\n})();"


@cache
def stylesheet() -> str:
    own = (_HERE / "static" / "report.css").read_text(encoding="utf-8")
    return own + colour.stylesheet()
