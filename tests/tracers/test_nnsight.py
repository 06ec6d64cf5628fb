"""nnsight: the numbers of transformers inside its traces, the caller's model left alone, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import sinklens
from sinklens.core.errors import ModelError
from sinklens.inputs.spans import Kind
from sinklens.mitigations import VAR
from sinklens.models.catalog import bundled
from sinklens.tracers.backends import backend_of, backends, open_with
from sinklens.tracers.executor import TracePlan, trace_batch
from tests.families import FAMILIES, build, tokenizer
from tests.pictures import batch_for, picture_prompt
from tests.tracers.agreement import WRAPPED, State, batch_of, differences, recorded

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

PROMPTS = [
    "the quick brown fox jumps over the lazy dog, " * 3,
    "the dog sleeps on and on, and the fox jumps. " * 3,
]


def wrapped(family: str, seed: int = 0) -> Any:
    """As its users hold it: text models with their tokenizer, vision-language ones by the base class."""
    from nnsight import NNsight
    from nnsight.modeling.transformers import TransformersModel

    model = build(family, seed)
    return (
        NNsight(model) if FAMILIES[family].kind != "text" else TransformersModel(model, tokenizer=tokenizer())
    )


@pytest.mark.parametrize("family", [*WRAPPED, "bert", "bert_mlm", "bloom", "falcon", "llava", "qwen2_5_vl"])
def test_every_signal_equals_that_of_transformers(family: str) -> None:
    model = build(family)
    assert differences(recorded(model, family), recorded(wrapped(family), family)) == []


def test_the_callers_model_is_left_as_it_was() -> None:
    held = wrapped("qwen3_moe")
    held._module.train()
    state = State(held._module)
    run = sinklens.profile(held, prompts=PROMPTS, verify=False)
    assert run.trace.tracing["backend"] == "nnsight"
    assert state.changed(held._module) == []
    with torch.no_grad(), held.trace(**batch_of("qwen3_moe").inputs):
        output = held.output.save()
    assert output.logits.shape[-1] == 320


def test_a_model_of_the_caller_is_copied_before_it_is_wrapped() -> None:
    model = build("llama")
    state = State(model)
    sinklens.profile(model, tokenizer=tokenizer(), prompts=PROMPTS, backend="nnsight", verify=False)
    assert state.changed(model) == []
    assert "forward" not in model.model.layers[0].__dict__


def test_a_pass_without_logits_ends_after_the_last_block() -> None:
    held = wrapped("llama")
    heads: list[int] = []
    held._module.lm_head.register_forward_hook(lambda *_: heads.append(1))
    opened, batch = open_with(held), batch_of("llama")
    trace_batch(opened, batch, TracePlan())  # finds out what writes, once
    heads.clear()
    records = trace_batch(opened, batch, TracePlan(), logits=False).records
    assert heads == []
    assert differences(trace_batch(opened, batch, TracePlan()).records, records) == []
    assert heads == [1]


def test_edits_that_the_model_carries_are_measured() -> None:
    held = wrapped("llama")
    plain = recorded(held, "llama")
    with held.edit() as (_, edited):
        edited.model.layers[1].output[:] = 0.0
    changed = recorded(edited, "llama")
    assert float(changed[0].arrays["residual_norm"][1].max()) == 0.0
    assert float(plain[0].arrays["residual_norm"][1].min()) > 0.0
    assert differences(plain, recorded(held, "llama")) == []
    # Experiments and mitigations run outside of traces, where edits are not in effect.
    run = sinklens.profile(edited, prompts=PROMPTS, analyzers=["primary-sinks"], verify=True)
    assert "1 edit that it carries" in str(run.causal_effects.reason)
    with pytest.raises(ModelError, match="cannot be judged"):
        sinklens.mitigate(edited, "zero-tuning:gamma=2", prompts=PROMPTS)


def test_mitigations_are_judged_as_on_the_transformers_model() -> None:
    def judged(model: Any) -> list[dict[str, Any]]:
        settings = {
            "tokenizer": tokenizer(),
            "prompts": PROMPTS,
            "n_items": 4,
            "analyzers": ["primary-sinks"],
        }
        run = sinklens.mitigate(model, "zero-tuning:layers=1+2:gamma=3", **settings)
        return [
            {key: value for key, value in row.items() if not key.startswith("ms_")}
            for row in run.evaluation.rows
        ]

    held = wrapped("llama")
    held._module.train()
    state = State(held._module)
    assert judged(held) == judged(build("llama"))
    assert state.changed(held._module) == []


def test_pictures_of_the_running_prompts_are_known_inside_a_trace() -> None:
    """Where spans say something else than the ids, a mitigation goes by the spans."""
    prompt = picture_prompt("llava", 23)
    assert prompt.visual is not None
    kinds = np.array(prompt.visual.spans.kinds)
    kinds[np.flatnonzero(kinds == Kind.VISUAL)[:4]] = Kind.SYSTEM
    spans = replace(prompt.visual.spans, kinds=kinds)
    batch = batch_for(replace(prompt, visual=replace(prompt.visual, spans=spans)))
    method, records = VAR(dims=(3, 17, 40), tau=0.5, rho=0.1, floor=0.0, p=0.9), []
    for model in (build("llava"), wrapped("llava")):
        with method(getattr(model, "_module", model)):
            records.append(trace_batch(open_with(model), batch, TracePlan()).records)
    assert differences(*records) == []
    assert differences(trace_batch(open_with(build("llava")), batch, TracePlan()).records, records[1])


def test_other_dtypes_are_measured() -> None:
    run = sinklens.profile(
        wrapped("llama"), prompts=PROMPTS, analyzers=["primary-sinks"], sensitivity=True, verify=False
    )
    assert not [note for note in run.sensitivity.notes if "float16" in note]
    assert {"in bfloat16", "in float16"} <= {row["variant"] for row in run.sensitivity.rows}


def test_findings_are_those_of_transformers() -> None:
    names = ["primary-sinks", "massive-activations", "sink-geometry", "writers"]
    runs = [sinklens.profile(n=2, seq_len=48, analyzers=names, backend=b) for b in ("hf", "nnsight")]
    ours, theirs = (run.document["findings"] for run in runs)
    assert ours == theirs
    assert all(check.passed for check in runs[1].checks)


def test_errors_inside_a_trace_arrive_as_they_are() -> None:
    opened = open_with(wrapped("llama"))
    broken = batch_of("llama")
    broken.inputs["input_ids"] = broken.inputs["input_ids"] + 10_000
    with pytest.raises(IndexError):
        backend_of(opened).forward(opened, broken)
    assert differences(recorded(build("llama"), "llama"), recorded(opened, "llama")) == []


def test_a_model_without_weights_is_refused() -> None:
    from nnsight.modeling.transformers import TransformersModel

    held = TransformersModel(str(bundled()["dense-ind"]), task="text-generation", tokenizer=tokenizer())
    with pytest.raises(ModelError, match="no weights yet"):
        open_with(held)


def test_what_wraps_no_model_is_refused() -> None:
    from nnsight import NNsight

    with pytest.raises(ModelError, match="not a transformers model"):
        open_with(NNsight(torch.nn.Linear(2, 2)))


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.tracers.backends.base.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"sinklens\[nnsight\]"):
        open_with(build("llama"), backend="nnsight")
    assert backends["hf"].installed
