"""sinklens: attention sinks and massive activations in transformers, measured and explained.

import sinklens as sl
run = sl.profile("gpt2")
run.primary_sinks.to_frame()
run.report("gpt2.html")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sinklens import analyzers as analyzers
    from sinklens import mitigations as mitigations
    from sinklens.mitigations.recipes import load_recipe as recipe
    from sinklens.pipeline import nns as nns
    from sinklens.pipeline import tl as tl
    from sinklens.pipeline.cite import cite as cite
    from sinklens.pipeline.compare import compare as compare
    from sinklens.pipeline.export import export as export
    from sinklens.pipeline.loading import load as load
    from sinklens.pipeline.mitigate import mitigate as mitigate
    from sinklens.pipeline.profile import profile as profile
    from sinklens.pipeline.run import Run as Run
    from sinklens.tracers.executor import trace as trace
    from sinklens.tracers.trace import Trace as Trace

_PUBLIC = {
    "Run": "sinklens.pipeline.run",
    "Trace": "sinklens.tracers.trace",
    "cite": "sinklens.pipeline.cite",
    "compare": "sinklens.pipeline.compare",
    "export": "sinklens.pipeline.export",
    "load": "sinklens.pipeline.loading",
    "mitigate": "sinklens.pipeline.mitigate",
    "profile": "sinklens.pipeline.profile",
    "trace": "sinklens.tracers.executor",
}
_MODULES = {
    "analyzers": "sinklens.analyzers",
    "mitigations": "sinklens.mitigations",
    "nns": "sinklens.pipeline.nns",
    "tl": "sinklens.pipeline.tl",
}
__all__ = [
    "Run",
    "Trace",
    "analyzers",
    "cite",
    "compare",
    "export",
    "load",
    "mitigate",
    "mitigations",
    "nns",
    "profile",
    "recipe",
    "tl",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "recipe":  # called otherwise where it is defined
        return import_module("sinklens.mitigations.recipes").load_recipe
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(_MODULES[name])
    raise AttributeError(f"module 'sinklens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
