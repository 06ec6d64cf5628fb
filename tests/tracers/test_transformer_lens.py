"""TransformerLens: the numbers of transformers, the caller's bridge left alone, and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import sinklens
from sinklens.core.errors import DataError, InterruptedRun, ModelError, UsageError
from sinklens.tracers.backends import backend_of, backends, open_with
from sinklens.tracers.backends.bridge_attention import Seam
from sinklens.tracers.batch import first_tensor, forward
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.selfcheck import self_check
from sinklens.tracers.signals import ALL_SIGNALS
from sinklens.tracers.sink_dims import SinkDims, SinkRule
from tests.families import build, tokenizer
from tests.pictures import batch_for, picture_prompt
from tests.tracers.agreement import WRAPPED, State, batch_of, differences, recorded

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

PROMPTS = [
    "the quick brown fox jumps over the lazy dog, " * 3,
    "the dog sleeps on and on, and the fox jumps. " * 3,
]


def bridge(family: str, seed: int = 0) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = build(family, seed)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


@pytest.mark.parametrize("family", [*WRAPPED, "bert_mlm", "llava"])
def test_every_signal_equals_that_of_transformers(family: str) -> None:
    model = build(family)
    assert differences(recorded(model, family), recorded(model, family, "transformer-lens")) == []


def test_scores_show_most_families_and_the_registry_the_others() -> None:
    seams = {
        family: open_with(bridge(family)).handle.seam for family in ("gpt_neox", "opt", "bert_mlm", "gptj")
    }
    assert seams == {
        "gpt_neox": Seam.SCORES,
        "opt": Seam.REGISTRY,
        "bert_mlm": Seam.REGISTRY,
        "gptj": Seam.WEIGHTS,
    }


def test_the_callers_bridge_is_left_as_it_was() -> None:
    held = bridge("qwen3_moe").train()
    forward(held.original_model, batch_of("qwen3_moe"))  # a bridge puts hooks of its own on in its first pass
    state, hooks = State(held.original_model), len(held._modules)
    run = sinklens.profile(held, tokenizer=tokenizer(), prompts=PROMPTS, verify=False)
    assert run.trace.tracing["backend"] == "transformer-lens"
    assert state.changed(held.original_model) == []
    assert len(held._modules) == hooks
    with pytest.raises(ZeroDivisionError):
        trace_batch(open_with(held.eval()), _Failing(batch_of("qwen3_moe")), TracePlan())  # type: ignore[arg-type]
    held.train()
    assert state.changed(held.original_model) == []


class _Failing:
    """A batch that breaks in the middle of a pass."""

    def __init__(self, batch: Any) -> None:
        self.inputs, self.prompts, self.size = batch.inputs, batch.prompts, batch.size
        self._valid, self._left = batch.valid, 8

    @property
    def valid(self) -> Any:
        self._left -= 1
        return self._valid if self._left > 0 else 1 / 0


def test_a_run_is_resumed_with_the_same_bridge_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no files that could tell, so its weights do."""
    from sinklens.tracers import executor

    (tmp_path / "prompts.txt").write_text("\n".join(prompt[:130] for prompt in PROMPTS) + "\n")
    settings: dict[str, Any] = {"tokenizer": tokenizer(), "verify": False, "analyzers": ["primary-sinks"]}
    settings |= {"prompts": str(tmp_path / "prompts.txt"), "batch_size": 1}
    real, done = executor.run_group, []

    def stopped(*given: Any, **named: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(executor, "run_group", stopped)
        with pytest.raises(InterruptedRun):
            sinklens.profile(bridge("llama"), out=tmp_path / "run", **settings)
    for other, what in (
        (bridge("llama", seed=3), "the weights changed"),
        (build("llama"), "the tracing changed"),
    ):
        with pytest.raises(DataError, match=what):
            sinklens.profile(other, tokenizer=tokenizer(), resume=tmp_path / "run")
    run = sinklens.profile(bridge("llama"), tokenizer=tokenizer(), resume=tmp_path / "run")
    assert differences(sinklens.profile(build("llama"), **settings).trace.records, run.trace.records) == []


def test_a_bridge_is_traced_by_itself() -> None:
    from sinklens.inputs import load_prompts

    prompts, model = load_prompts(PROMPTS, tokenizer()), build("qwen2")
    ours, theirs = sinklens.trace(bridge("qwen2"), prompts), sinklens.trace(model, prompts)
    assert differences(theirs.records, ours.records) == []


def test_experiments_on_a_bridge_are_those_of_transformers() -> None:
    settings: dict[str, Any] = {"n": 2, "seq_len": 48, "analyzers": ["primary-sinks"], "verify": True}
    ours, theirs = (
        sinklens.profile(backend=name, **settings).causal_effects for name in ("hf", "transformer-lens")
    )
    assert ours.rows
    assert ours.verdict == theirs.verdict


def test_a_model_of_the_caller_is_copied_before_it_is_wrapped() -> None:
    model = build("llama")
    state = State(model)
    sinklens.profile(model, tokenizer=tokenizer(), prompts=PROMPTS, backend="transformer-lens", verify=False)
    assert state.changed(model) == []
    assert type(model.model.layers[0]).__name__ == "LlamaDecoderLayer"


def test_findings_are_those_of_transformers() -> None:
    names = ["primary-sinks", "massive-activations", "sink-geometry", "writers"]
    runs = [sinklens.profile(n=2, seq_len=48, analyzers=names, backend=b) for b in ("hf", "transformer-lens")]
    ours, theirs = (run.document["findings"] for run in runs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name]["status"] == theirs[name]["status"]
        assert ours[name]["verdict"] == theirs[name]["verdict"]


def test_hooks_of_the_caller_are_part_of_what_is_measured() -> None:
    held = bridge("llama")
    plain = recorded(held, "llama")

    def without_first_head(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        pattern = pattern.clone()
        pattern[:, 0, 1:, 0] = 0.0
        return pattern

    with held.hooks(fwd_hooks=[("blocks.2.attn.hook_pattern", without_first_head)]):
        hooked = recorded(held, "llama")
        run = sinklens.profile(held, tokenizer=tokenizer(), prompts=PROMPTS, verify=True)
        checks = backend_of(opened := open_with(held)).checks(opened, batch_of("llama"))
    assert (
        hooked[0].arrays["attention_received"][2, 0, 0] < plain[0].arrays["attention_received"][2, 0, 0] / 3
    )
    assert "not compared" in checks[0].detail
    assert "hooks on 1 of its hook points" in str(run.causal_effects.reason)
    assert differences(plain, recorded(held, "llama")) == []


def test_a_bridge_that_computes_something_else_fails_the_check() -> None:
    """The adapter of Falcon with ALiBi gives other numbers than transformers."""
    opened = open_with(build("falcon_alibi"), backend="transformer-lens")
    (check,) = backend_of(opened).checks(opened, batch_of("falcon_alibi"))
    assert not check.passed
    assert check.value is not None
    assert check.value > 0.01


def test_left_padding_of_bert_is_refused() -> None:
    opened = open_with(bridge("bert_mlm"))
    batch = batch_of("bert_mlm", padding="left")
    with pytest.raises(ModelError, match="left-padded bert"):
        trace_batch(opened, batch, TracePlan())
    # The reason: the bridge's own forward gives other numbers.
    ours = opened.handle.bridge(batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"])
    theirs = first_tensor(forward(opened.plain, batch))
    assert float((ours - theirs)[batch.valid].abs().max()) > 0.01


def test_rewritten_weights_are_refused_and_compatibility_names_are_not() -> None:
    held = bridge("gpt2")
    held.enable_compatibility_mode(no_processing=True)
    assert differences(recorded(build("gpt2"), "gpt2"), recorded(held, "gpt2")) == []
    folded = bridge("gpt2")
    folded.enable_compatibility_mode()
    with pytest.raises(ModelError, match="rewritten"):
        open_with(folded)


def test_what_is_no_bridge_is_refused() -> None:
    from transformer_lens.HookedRootModule import HookedRootModule

    class HookedTransformer(HookedRootModule):
        """What older versions had."""

    with pytest.raises(ModelError, match="HookedTransformer of TransformerLens cannot be profiled"):
        open_with(HookedTransformer())


@pytest.mark.parametrize("family", ["bert", "falcon", "qwen2_vl", "gpt_neo"])
def test_families_that_cannot_be_wrapped_are_refused_in_words(family: str) -> None:
    with pytest.raises(ModelError) as refused:
        open_with(build(family), backend="transformer-lens")
    assert "--backend hf" in str(refused.value)


def test_nothing_is_installed_and_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: called.append(a))
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    before = dict(os.environ)
    open_with(build("llava"), backend="transformer-lens")
    assert called == []
    assert dict(os.environ) == before


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.tracers.backends.base.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"sinklens\[transformer-lens\]"):
        open_with(build("llama"), backend="transformer-lens")


def test_a_release_it_was_not_made_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinklens.tracers.backends.base.package_version", lambda name: "3.1.0")
    with pytest.raises(ModelError, match=r"needs TransformerLens .*>=4\.3.*; 3\.1\.0 is installed"):
        open_with(build("llama"), backend="transformer-lens")


def test_backends_are_told_apart_and_misspelt_ones_explained() -> None:
    held = bridge("llama")
    assert backends["transformer-lens"].owns(held)
    assert not backends["transformer-lens"].owns(build("llama"))
    with pytest.raises(UsageError, match="Did you mean 'transformer-lens'"):
        open_with(build("llama"), backend="transformerlens")
    with pytest.raises(UsageError, match="held by TransformerLens"):
        open_with(held, backend="nnsight")
    with pytest.raises(UsageError, match="in memory already"):
        open_with(held, dtype="bf16")


def test_the_self_check_passes_on_a_bridge() -> None:
    opened = open_with(bridge("gemma2"), tokenizer())
    from sinklens.inputs import load_prompts

    prompts = load_prompts(PROMPTS, opened.tokenizer).prompts
    checks = self_check(opened, prompts, TracePlan())
    assert [check.name for check in checks if not check.passed] == []
    assert {"bridge = transformers", "blocked = dense, padded batch", "attention mass is one"} <= {
        check.name for check in checks
    }


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_pictures_are_seen_as_in_transformers(family: str) -> None:
    """Every signal, those of the vision tower included, and the checks of pictures."""
    model, prompt = build(family), picture_prompt(family, 23)
    rule = SinkRule(SinkDims.given((3, 17, 40), 64), 1.9)
    plan = TracePlan(frozenset(ALL_SIGNALS), sinks=rule)
    ours, theirs = (
        trace_batch(open_with(model, backend=name), batch_for(prompt), plan).records
        for name in ("transformer-lens", "hf")
    )
    assert differences(theirs, ours) == []
    assert {"vision_received", "visual_mass", "phi"} <= ours[0].arrays.keys()
    checks = self_check(open_with(bridge(family)), [prompt], plan)
    assert [check.name for check in checks if not check.passed] == []
    assert {"vision tower: blocked = dense", "bridge = transformers"} <= {check.name for check in checks}


def test_signals_that_no_hook_shows_are_refused_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """If queries and keys are found at no hook, what reads them is refused if named and explained if not."""
    monkeypatch.setattr("sinklens.tracers.backends.bridge_attention.QUERIES", ("hook_none",) * 3)
    model = copy.deepcopy(build("llama"))
    settings: dict[str, Any] = {"tokenizer": tokenizer(), "prompts": PROMPTS, "backend": "transformer-lens"}
    with pytest.raises(UsageError, match="sink-geometry needs"):
        sinklens.profile(model, analyzers=["sink-geometry"], **settings)
    run = sinklens.profile(model, verify=False, **settings)
    assert run.sink_geometry.status == "not-applicable"
    assert "transformer-lens backend cannot give" in str(run.sink_geometry.reason)
    assert run.primary_sinks.status != "not-applicable"
    assert "qk_cosine" not in run.trace.records[0].arrays
