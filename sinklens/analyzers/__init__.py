"""One file = one finding. Analyzers read a trace, never a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sinklens.core.errors import UsageError
from sinklens.core.suggest import did_you_mean

from .attention_concentration import AttentionConcentration
from .attention_divergence import AttentionDivergence
from .attention_entropy import AttentionEntropy
from .background_share import BackgroundShare
from .base import Analyzer, Finding, Reference, Status, registry
from .bos_alignment import BosAlignment
from .bos_map import BosMap
from .causal_effects import CausalEffects
from .contribution_norm import ContributionNorm
from .embed_lens import EmbedLens
from .expert_cascade import ExpertCascade
from .fai import Fai
from .gaze_shift import GazeShift
from .head_classes import HeadClasses
from .head_roles import HeadRoles
from .image_centric_heads import ImageCentricHeads
from .information_horizon import InformationHorizon
from .mass_ledger import MassLedger
from .massive_activations import MassiveActivations
from .matrix_entropy import MatrixEntropy
from .mean_maps import MeanMaps
from .modality_dominance import ModalityDominance
from .normalised_attention import NormalisedAttention
from .position_bias import PositionBias
from .primary_sinks import PrimarySinks
from .secondary_sinks import SecondarySinks
from .sensitivity import Sensitivity
from .sink_geometry import SinkGeometry
from .super_experts import SuperExperts
from .token_transitions import TokenTransitions
from .vision_tower_sinks import VisionTowerSinks
from .visual_effects import VisualEffects
from .visual_exit import VisualExitLayer
from .visual_rank import VisualRank
from .visual_sinks import VisualSinks
from .visual_tokens import VisualTokens
from .waad import Waad
from .window_shares import WindowShares
from .writers import Writers

__all__ = [
    "Analyzer",
    "AttentionConcentration",
    "AttentionDivergence",
    "AttentionEntropy",
    "BackgroundShare",
    "BosAlignment",
    "BosMap",
    "CausalEffects",
    "ContributionNorm",
    "EmbedLens",
    "ExpertCascade",
    "Fai",
    "Finding",
    "GazeShift",
    "HeadClasses",
    "HeadRoles",
    "ImageCentricHeads",
    "InformationHorizon",
    "MassLedger",
    "MassiveActivations",
    "MatrixEntropy",
    "MeanMaps",
    "ModalityDominance",
    "NormalisedAttention",
    "PositionBias",
    "PrimarySinks",
    "Reference",
    "SecondarySinks",
    "Sensitivity",
    "SinkGeometry",
    "Status",
    "SuperExperts",
    "TokenTransitions",
    "VisionTowerSinks",
    "VisualEffects",
    "VisualExitLayer",
    "VisualRank",
    "VisualSinks",
    "VisualTokens",
    "Waad",
    "WindowShares",
    "Writers",
    "chosen_analyzers",
    "make",
    "registry",
]


def chosen_analyzers(asked: str | Iterable[Analyzer | str | type[Analyzer]]) -> tuple[Analyzer, ...]:
    """Analyzers from instances, classes, or `name` / `name:field=value:field=value` strings.

    An empty list takes the default ones; `all` takes every one that is not listed beside it.
    """
    items = [item for item in (asked.split(",") if isinstance(asked, str) else asked) if item != ""]
    chosen = [_instance(item) for item in items if item != "all"]
    named = {analyzer.name for analyzer in chosen}
    if not items or "all" in items:
        chosen += [cls() for name, cls in registry.items() if name not in named and (items or cls.default)]
    chosen.sort(key=lambda analyzer: analyzer.place)
    names = [analyzer.name for analyzer in chosen]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"Analyzer {sorted(twice)[0]!r} is asked for twice.")
    return tuple(chosen)


def make(text: str) -> Analyzer:
    """An analyzer from its command-line form, for instance `primary-sinks:epsilon=0.2:recipe=code`."""
    name, *settings = text.split(":")
    cls = registry[name]
    return cls(**dict(_setting(cls, setting) for setting in settings))


def _instance(item: Analyzer | str | type[Analyzer]) -> Analyzer:
    if isinstance(item, str):
        return make(item)
    return item() if isinstance(item, type) else item


def _setting(cls: type[Analyzer], text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.replace("-", "_")
    known = {f.name: type(f.default) for f in fields(cls)}  # type: ignore[arg-type]
    if not equals and key in known:
        raise UsageError(f"{cls.name}: {key} needs a value.", hint=f"Write {cls.name}:{key}=VALUE.")
    if not equals or key not in known:
        raise UsageError(
            f"{cls.name} has no parameter {key!r}.",
            detail=did_you_mean(key, known) or f"It has: {', '.join(known)}.",
            hint=f"Write {cls.name}:parameter=value.",
        )
    kind = known[key]
    try:
        return key, _BOOLEANS[value.lower()] if kind is bool else kind(value) if kind in (
            int,
            float,
        ) else value
    except (KeyError, ValueError):
        raise UsageError(f"{cls.name}: {key} must be a {kind.__name__}, got {value!r}.") from None


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
