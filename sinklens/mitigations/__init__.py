"""Mitigations: one file = one method, put on a model for the length of a `with`.

with ZeroTuning(gamma=2.0)(model) as effect:
    model.generate(**inputs)
print(effect.verdict)
"""

from __future__ import annotations

from .act import ACT
from .asking import chosen_methods
from .base import Mitigation
from .edits import Edits
from .effect import Effect, NothingEdited, Outcome
from .expert_pruning import ExpertPruning
from .gift import GIFT
from .knock_out import KnockOut
from .kv_bias import KVBias
from .learned_sink import LearnedSink
from .massive import MassiveActivations
from .method import Method, registry
from .pai import PAI
from .paint import PAINT
from .quantise import FakeQuantisation
from .recipes import Recipe
from .recipes import load_recipe as load
from .scaling import AttentionScaling
from .sink_gating import SinkGating
from .sink_values import kv_bias_for, learned_sink_for
from .value_bias import ValueBias
from .var import VAR
from .zero_tuning import ZeroTuning

__all__ = [
    "ACT",
    "GIFT",
    "PAI",
    "PAINT",
    "VAR",
    "AttentionScaling",
    "Edits",
    "Effect",
    "ExpertPruning",
    "FakeQuantisation",
    "KVBias",
    "KnockOut",
    "LearnedSink",
    "MassiveActivations",
    "Method",
    "Mitigation",
    "NothingEdited",
    "Outcome",
    "Recipe",
    "SinkGating",
    "ValueBias",
    "ZeroTuning",
    "chosen_methods",
    "kv_bias_for",
    "learned_sink_for",
    "load",
    "registry",
]
