"""The self-check must fail when the measurement is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sinklens
from sinklens.cli.main import main
from sinklens.core.errors import SelfCheckError
from sinklens.inputs.spec import Prompt
from sinklens.kernels.spec import Stat
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers import attention
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.selfcheck import self_check
from tests.families import FAMILIES

from .test_families import opened

TEXT = [name for name, family in FAMILIES.items() if family.kind in ("text", "encoder")]


def prompts(n: int = 2, length: int = 40) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(n):
        ids = [1, *torch.randint(5, 300, (length - 1 - 9 * index,), generator=generator).tolist()]
        made.append(Prompt(index, tuple(ids), ("x",) * len(ids), "made"))
    return made


@pytest.mark.parametrize("mode", ["faithful", "fused"])
@pytest.mark.parametrize("family", TEXT)
def test_every_family_passes(family: str, mode: str) -> None:
    checks = self_check(opened(family), prompts(), TracePlan(mode=attention.Mode(mode)))
    assert [check for check in checks if not check.passed] == []
    assert len(checks) >= 5
    if FAMILIES[family].window:
        assert any(check.name == "sliding window" and "engages" in check.detail for check in checks)
    if FAMILIES[family].moe:
        assert any(check.name == "all experts seen" for check in checks)


def test_wrong_statistics_give_no_verdict(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    real = attention.attention_sweep

    def wrong(*args: Any) -> Any:
        statistics = real(*args)
        if Stat.RECEIVED in statistics.values:
            statistics.values[Stat.RECEIVED] = statistics.values[Stat.RECEIVED] * 1.03
        return statistics

    monkeypatch.setattr(attention, "attention_sweep", wrong)
    out = tmp_path / "run"
    assert main(["profile", "-q", "--out", str(out)]) == 5
    message = capsys.readouterr().err
    assert "Self-check failed: blocked = dense" in message
    assert "No verdict" in message
    document = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert document["verdict"]["status"] == "untrusted"
    assert document["findings"] == {}
    assert "not trustworthy" in (out / "report.html").read_text(encoding="utf-8").lower()
    back = sinklens.load(out)
    assert isinstance(back, sinklens.Run)
    assert back.findings == {}


def test_a_changed_output_is_noticed(monkeypatch: Any) -> None:
    real = attention.own_kernel

    def off(module: Any, implementation: str) -> Any:
        own = real(module, implementation)
        return lambda *a, **k: (own(*a, **k)[0] * 1.0001, None)

    monkeypatch.setattr(attention, "own_kernel", off)
    failed = {check.name for check in self_check(opened("llama"), prompts(), TracePlan()) if not check.passed}
    assert failed == {"tracing leaves the output unchanged"}


def test_attention_that_is_not_seen_is_noticed() -> None:
    model = opened("llama")
    tower = model.anatomy.main
    blocks = (*tower.blocks[:-1], replace(tower.blocks[-1], attention="model.layers.2.self_attn"))
    model.anatomy = replace(model.anatomy, towers=(replace(tower, blocks=blocks),))
    failed = {check.name for check in self_check(model, prompts(), TracePlan()) if not check.passed}
    assert "all attention seen" in failed
    assert find_anatomy(model.module) != model.anatomy


def test_overflowing_activations_give_no_verdict() -> None:
    model = opened("llama")
    with torch.no_grad():
        model.module.get_submodule("model.layers.1.mlp.down_proj").weight.mul_(1e30)  # type: ignore[operator]
        model.module.get_submodule("model.layers.2.mlp.down_proj").weight.mul_(1e30)  # type: ignore[operator]
    failed = {check.name for check in self_check(model, prompts(), TracePlan()) if not check.passed}
    assert "all values finite" in failed


def test_experts_that_round_differently_are_run_beside_the_models_own(monkeypatch: Any) -> None:
    from sinklens.tracers import experts

    real = experts.routed_experts

    def rounding(*args: Any) -> Any:
        output, routed = real(*args)
        return output * (1 + 1e-6), routed

    monkeypatch.setattr(experts, "routed_experts", rounding)
    model = opened("qwen3_moe")
    run = sinklens.profile(model, prompts=[list(p.token_ids) for p in prompts()])
    assert run.trace.tracing["own_experts"] is True
    assert all(check.passed for check in run.checks)


def test_training_mode_is_refused_and_given_back() -> None:
    model = opened("llama")
    model.module.train()
    with pytest.raises(SelfCheckError, match="evaluation mode"):
        sinklens.profile(model, prompts=[list(p.token_ids) for p in prompts()])
    module = opened("llama").module.train()
    run = sinklens.profile(module, prompts=[list(p.token_ids) for p in prompts()])
    assert run.checks[0].passed
    assert all(part.training for part in module.modules())


def test_the_kernels_own_normaliser_is_a_witness(monkeypatch: Any) -> None:
    checks = self_check(opened("llama"), prompts(), TracePlan())
    witness = next(check for check in checks if check.name == "normaliser = the kernel's own")
    assert witness.passed
    assert witness.value is not None
    assert witness.value < 1e-5
    # Scores of another scale than the kernel's: blocked and dense agree with each other and with nothing else.
    real = attention.attention_call
    monkeypatch.setattr(attention, "attention_call", lambda *a, **k: replace(real(*a, **k), scale=0.3))
    failed = {check.name for check in self_check(opened("llama"), prompts(), TracePlan()) if not check.passed}
    assert failed == {"normaliser = the kernel's own"}
