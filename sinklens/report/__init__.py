"""The report of a run and the comparison of runs, one offline HTML file each; the notebook's short form; figures for
papers. Plain data in."""

from __future__ import annotations

from typing import Any

_PLACES = {
    "render_report": "html",
    "write_report": "html",
    "read_report": "embed",
    "render_comparison": "comparison",
    "write_comparison": "comparison",
    "run_repr_html": "notebook",
    "draw": "paper",
    "interactive": "paper",
    "save_figure": "paper",
}

__all__ = list(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Loads a part when it is first used: importing sinklens needs no templates or drawing libraries."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
