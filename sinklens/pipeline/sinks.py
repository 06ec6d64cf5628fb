"""Before a run with pictures: which dims its sinks are read from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sinklens.analyzers import Analyzer
from sinklens.analyzers.visual import parse_dims
from sinklens.inputs.encode import Bos
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers.calibrate_dims import search_sink_dims
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.signals import INPUT_TYPICAL, PHI
from sinklens.tracers.signals_visual import OF_PICTURES, OF_TEXT_QUERIES
from sinklens.tracers.sink_dims import THIRD_PARTY, SinkDims, SinkRule, known

from .options import ProfileOptions

SEARCHED = 8
"""Prompts of text, and as many with pictures, that sink dims are searched on."""
SEARCH_LENGTH = 64
PUBLISHED, NOTES = "published", THIRD_PARTY.replace(" ", "-")


def with_sinks(
    plan: TracePlan,
    options: ProfileOptions,
    opened: OpenedModel,
    prompts: PromptSet,
    analyzers: tuple[Analyzer, ...],
) -> TracePlan:
    """The plan with the rule by which tokens are sinks; without what only pictures have if no prompt has any.

    Args:
        options: `sink_dims` of None searches for the sink dims on the model, `published` takes bundled ones that a
            paper stands for, `third-party` also takes others', and `1415,2533` names them.

    Raises:
        UsageError: Published dims that are not known or not this model's, or dims it does not have.
    """
    pictured = [prompt for prompt in prompts.prompts if prompt.visual is not None]
    if not pictured:
        return replace(plan, signals=plan.signals - OF_PICTURES - {INPUT_TYPICAL})
    if not plan.signals & (OF_TEXT_QUERIES | {PHI}):
        return plan
    dims = dims_asked_for(options.sink_dims, opened)
    if dims is None:
        dims = search_sink_dims(opened, [*texts(opened, options.bos), *pictured[:SEARCHED]], plan)
    return replace(plan, sinks=SinkRule(dims, **_threshold(analyzers)))


def dims_asked_for(asked: str | None, opened: OpenedModel) -> SinkDims | None:
    """The dims that `published`, `third-party` or numbers name; None if they are to be searched for.

    Raises:
        UsageError: They are not known, not this model's, or it does not have them.
    """
    size = opened.anatomy.main.hidden_size
    if asked in (PUBLISHED, NOTES):
        return known(opened.info.id, size, third_party=asked == NOTES)
    return None if asked is None else SinkDims.given(parse_dims(asked), size)


def _threshold(analyzers: tuple[Analyzer, ...]) -> dict[str, Any]:
    """The threshold of the analyzer of visual sinks, if it takes part."""
    for analyzer in analyzers:
        if analyzer.name == "visual-sinks":
            given = analyzer.parameters
            strict = given["recipe"] == "code"
            return {"tau": given["tau"], "tau_energy": given["tau_energy"] or None, "strict": strict}
    return {}


def texts(opened: OpenedModel, bos: Bos = "auto") -> list[Prompt]:
    """Short prompts of the bundled corpus; none where the model has no words for it."""
    from sinklens.inputs import load_prompts

    tokenizer: Any = opened.tokenizer
    if tokenizer is None:
        return []
    found = load_prompts("corpus:mixed", tokenizer, n=SEARCHED, seq_len=SEARCH_LENGTH, bos=bos).prompts
    unknown = getattr(tokenizer, "unk_token_id", None)
    tokens = [token for prompt in found for token in prompt.token_ids]
    if unknown is not None and tokens.count(unknown) > len(tokens) / 2:
        return []
    return list(found)
