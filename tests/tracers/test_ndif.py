"""NDIF: reductions on the host give the numbers of transformers; keys, versions and what cannot run there.

The host is nnsight's own simulation: the trace is serialised, read back with this package hidden, and run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import sinklens
from sinklens.cli.main import main
from sinklens.core.errors import ModelError, ResourceError, UsageError
from sinklens.models.spec import OpenedModel
from sinklens.tracers.backends import backend_of, backends, open_with
from sinklens.tracers.backends.ndif import Hosted, explained
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.signals import ALL_SIGNALS
from tests.families import build, tokenizer
from tests.tracers.agreement import batch_of, differences
from tests.tracers.test_nnsight import wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPTS = [
    "the quick brown fox jumps over the lazy dog, " * 3,
    "the dog sleeps on and on, and the fox jumps. " * 3,
]
PLAN = TracePlan(signals=frozenset(ALL_SIGNALS) - set(backends["ndif"].lacks))


def hosted(family: str) -> OpenedModel:
    model = wrapped(family)
    return replace(open_with(model), backend="ndif", handle=Hosted(model, "local"))


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gpt2", "gemma2", "gpt_oss", "deepseek_v2", "qwen3_moe"]
)
def test_reductions_on_the_host_equal_those_of_transformers(family: str) -> None:
    batch = batch_of(family)
    ours = trace_batch(open_with(build(family)), batch, PLAN).records
    theirs = trace_batch(hosted(family), batch, PLAN).records
    assert len(ours[0].arrays) > 25
    assert differences(ours, theirs) == []


def test_only_reductions_come_back() -> None:
    from sinklens.tracers.backends.ndif import remote_pass

    batch = batch_of("llama")
    tokens = batch.inputs["input_ids"].shape[1]
    for layer in remote_pass(hosted("llama"), batch, ranks=8):
        sizes = {name: value.shape for name, value in layer["attention"].items()}
        assert not any(list(shape).count(tokens) > 1 for shape in sizes.values()), sizes
        assert all(value.ndim <= 1 for made in layer["state"] for value in made.values())


def test_a_profile_runs_on_the_host_and_says_what_it_cannot_tell() -> None:
    opened = replace(hosted("llama"), tokenizer=tokenizer())
    run = sinklens.profile(opened, prompts=PROMPTS)
    here = sinklens.profile(build("llama"), tokenizer=tokenizer(), prompts=PROMPTS, verify=False)
    assert [check.name for check in run.checks] == [
        "all attention seen",
        "attention mass is one",
        "all values finite",
    ]
    assert run.trace.tracing["backend"] == "ndif"
    for name in ("primary-sinks", "massive-activations", "attention-entropy"):
        if name in run.findings and run.findings[name].status != "not-applicable":
            assert run.findings[name].verdict == here.findings[name].verdict
    assert run.massive_activations.status != "not-applicable"
    assert "ndif backend cannot give" in str(run.sink_geometry.reason)
    assert "other machines" in str(run.causal_effects.reason)


def test_an_analyzer_that_needs_more_is_refused_if_named() -> None:
    opened = replace(hosted("llama"), tokenizer=tokenizer())
    with pytest.raises(UsageError, match="writers needs"):
        sinklens.profile(opened, prompts=PROMPTS, analyzers=["writers"])


def test_without_a_key_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    assert main(["profile", "-m", "gpt2", "--backend", "nnsight", "--remote", "-q"]) == 3
    said = capsys.readouterr().err
    assert "NDIF needs an API key" in said
    assert "nnsight login" in said


def test_folders_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", "none")
    with pytest.raises(ModelError, match="is a folder here"):
        open_with(None, backend="ndif")
    with pytest.raises(UsageError, match="device cannot be chosen"):
        open_with("gpt2", backend="ndif", device="cuda")


def test_a_host_with_other_versions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight.ndif

    recorded = {
        "python_version": "3.12.7",
        "packages": {"nnsight": "0.7.0", "torch": "2.8.0", "numpy": "2.1.0"},
    }
    monkeypatch.setattr(nnsight.ndif, "get_remote_env", lambda **_: recorded)
    error = explained("AttributeError: no such operation")
    assert isinstance(error, ModelError)
    assert "different versions" in error.what
    assert "nnsight is 0.8" in str(error.detail)
    assert "0.7.0 there" in str(error.detail)


def test_what_the_host_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight.ndif

    def unreachable(**_: Any) -> dict[str, Any]:
        raise OSError("no network")

    monkeypatch.setattr(nnsight.ndif, "get_remote_env", unreachable)
    assert isinstance(explained("CUDA out of memory. Tried to allocate 2 GiB"), ResourceError)
    assert "refused the API key" in explained("Failed to send request: Invalid API key").what
    assert "different versions" in explained("Client version 0.8.1 is not supported").what
    assert explained("Model gpt2 is not deployed").what.endswith("Model gpt2 is not deployed")


def test_an_answer_of_the_host_becomes_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.intervention.backends.remote import RemoteError

    opened = hosted("llama")

    def refusing(*_: Any, **__: Any) -> Any:
        raise RemoteError("Failed to send request: Invalid API key")

    monkeypatch.setattr(opened.handle.model, "trace", refusing, raising=False)
    with pytest.raises(ModelError, match="refused the API key"):
        trace_batch(opened, batch_of("llama"), PLAN)


def test_families_without_the_call_are_refused() -> None:
    opened = hosted("bloom")
    with pytest.raises(ModelError, match="does not call a function"):
        backend_of(opened).hosted(opened, batch_of("bloom"), PLAN)


def test_long_rows_are_reduced_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trace_batch(hosted("mistral"), batch_of("mistral"), PLAN).records
    monkeypatch.setattr("sinklens.tracers.backends.ndif.BLOCK", 5)
    assert differences(whole, trace_batch(hosted("mistral"), batch_of("mistral"), PLAN).records) == []
    assert torch.is_tensor(batch_of("mistral").valid)
