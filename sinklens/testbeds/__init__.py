"""Models of which the truth is known: trained ones that grew sinks, and planted ones whose sinks were put there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import TestbedInfo as TestbedInfo
    from .api import list_testbeds as list_testbeds
    from .api import plant_testbed as plant_testbed
    from .api import train_testbed as train_testbed
    from .controls import one_layer_control as one_layer_control
    from .controls import random_control as random_control
    from .controls import uniform_control as uniform_control
    from .planting.plant import plant as plant
    from .planting.truth import MassivePlant as MassivePlant
    from .planting.truth import SecondaryPlant as SecondaryPlant
    from .planting.truth import SinkPlant as SinkPlant
    from .planting.truth import SuperExpertPlant as SuperExpertPlant
    from .planting.truth import Truth as Truth

_HOMES = {
    "TestbedInfo": "api",
    "list_testbeds": "api",
    "plant_testbed": "api",
    "train_testbed": "api",
    "one_layer_control": "controls",
    "random_control": "controls",
    "uniform_control": "controls",
    "plant": "planting.plant",
    "MassivePlant": "planting.truth",
    "SecondaryPlant": "planting.truth",
    "SinkPlant": "planting.truth",
    "SuperExpertPlant": "planting.truth",
    "Truth": "planting.truth",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that looking at the package does not bring torch in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
