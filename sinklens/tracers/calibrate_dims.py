"""The search for sink dims on a model: a few short prompts through it, and the choice from what they show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sinklens.inputs.spec import Prompt
from sinklens.models.spec import OpenedModel

from . import signals as sig
from .discover_dims import RULES, Rules, discover, middle_layers, reference_token
from .executor import TracePlan, trace
from .sink_dims import SinkDims
from .trace import PromptRecord

NEEDED = frozenset(
    {
        sig.INPUT_REFERENCE,
        sig.INPUT_TYPICAL,
        sig.ATTENTION_RECEIVED,
        sig.ATTENTION_RECEIVED_MEAN,
        sig.VISIBLE_QUERIES,
    }
)


_READ = NEEDED - {sig.ATTENTION_RECEIVED}


def search_sink_dims(
    opened: OpenedModel, prompts: Sequence[Prompt], plan: TracePlan | None = None, rules: Rules = RULES
) -> SinkDims:
    """Find the sink dims of a model on some prompts; eight of text and eight with pictures are enough.

    Args:
        plan: Mode and block sizes of the run.
    """
    plan = replace(plan or TracePlan(), signals=NEEDED, sinks=None, ablate=frozenset())
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    traced = trace(opened, numbered, plan)
    return dims_of(traced.records, opened.anatomy.main.hidden_size, rules)


def dims_of(records: Iterable[PromptRecord], hidden_size: int, rules: Rules = RULES) -> SinkDims:
    """Choose the sink dims from traced prompts.

    A prompt takes part in the layers in which its reference token was one of the two that are followed.
    """
    strengths: list[np.ndarray] = []
    baselines: list[np.ndarray] = []
    text = pictures = 0
    for record in records:
        if not {signal.name for signal in _READ} <= record.arrays.keys():
            why = "the attention, or the states that enter the layers, could not be seen."
            return SinkDims((), hidden_size, "discovered", "no prompts", "measured", why, True)
        text, pictures = text + (record.spans is None), pictures + (record.spans is not None)
        received = record[sig.ATTENTION_RECEIVED_MEAN]
        token = reference_token(received, record[sig.VISIBLE_QUERIES])
        followed = record[sig.INPUT_REFERENCE.name + "_pos"]
        for layer in middle_layers(len(received)):
            for slot in np.flatnonzero(followed[layer] == token)[:1]:
                strengths.append(record[sig.INPUT_REFERENCE][layer, slot])
                baselines.append(record[sig.INPUT_TYPICAL][layer].astype(np.float32))
    where = " and ".join(
        f"{count} {what}{'s' if count > 1 else ''}{rest}"
        for count, what, rest in ((text, "text prompt", ""), (pictures, "prompt", " with pictures"))
        if count
    )
    if not strengths:
        why = "the token that receives most attention was not followed in the middle layers."
        return SinkDims((), hidden_size, "discovered", where or "no prompts", "measured", why, True)
    return discover(np.array(strengths), np.array(baselines), where, rules)
