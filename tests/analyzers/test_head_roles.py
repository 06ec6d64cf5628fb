"""Dormant, switching and domain-dependent heads, by construction; numbers against the plainest code."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.head_roles import HeadRoles
from sinklens.analyzers.heads import bimodality
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record, softmax_maps, visibility

L, H, T = 3, 4, 64


def switching(weights: np.ndarray, layer: int, head: int, at: int) -> None:
    """Every other query puts all its attention on the sink, the others none of it."""
    block = weights[layer, head]
    for query in range(at + 1, len(block)):
        block[query] = 0
        block[query, at if query % 2 else query] = 1


def maps(at: int = 0, *, code: bool = True) -> np.ndarray:
    """Head (0, 1) always dormant, (1, 3) in code only, (2, 0) on every other query, (2, 2) half of each row."""
    weights = causal_uniform(L, H, T)
    with_sink(weights, 0, 1, at, 0.97)
    if code:
        with_sink(weights, 1, 3, at, 0.95)
    switching(weights, 2, 0, at)
    with_sink(weights, 2, 2, at, 0.6)
    return weights


def mixed(at: int = 0) -> list:
    return [
        head_record(
            maps(at, code=i % 2 == 0), domain="code" if i % 2 == 0 else "prose", index=i, references=(0, at)
        )
        for i in range(8)
    ]


@pytest.mark.parametrize("at", [0, 6])
def test_every_role_is_found(at: int) -> None:
    finding = HeadRoles().analyze(trace(mixed(at)))
    roles = {(row["layer"], row["head"]): row["role"] for row in finding.rows}
    assert roles == {(0, 1): "dormant", (1, 3): "by domain", (2, 0): "switching", (2, 2): "partial"}
    assert finding.status is Status.FOUND
    assert finding.summary["position"] == at
    assert finding.summary["dormant_by_domain"] == {"code": 2, "prose": 1}
    assert finding.verdict.startswith(
        f"2 of 12 heads are dormant on position {at} ('t{at}') in code, 1 in prose"
    )
    assert "1 depends on the domain (layer 1 head 3)" in finding.verdict
    assert "1 rests on it for some queries and looks elsewhere for others" in finding.verdict


def test_dormancy_is_the_mean_over_later_queries() -> None:
    weights = softmax_maps(0, L, H, T)
    with_sink(weights, 1, 2, 0, 0.8)
    finding = HeadRoles(active=0.01).analyze(trace([head_record(weights)]))
    for row in finding.rows:
        expected = weights[row["layer"], row["head"], 1:, 0].mean()
        assert row["dormancy"] == pytest.approx(expected)
    assert (1, 2) in {(row["layer"], row["head"]) for row in finding.rows}


def test_contrast_and_its_chance() -> None:
    row = next(row for row in HeadRoles().analyze(trace(mixed())).rows if row["role"] == "by domain")
    inside, outside = maps(code=True)[1, 3, 1:, 0].mean(), maps(code=False)[1, 3, 1:, 0].mean()
    assert row["contrast"] == pytest.approx(inside - outside)
    assert row["most_dormant_in"] == "code"
    # 4 + 4 prompts: 2 of 70 assignments separate the domains as well as the true one does.
    assert row["contrast_p"] == pytest.approx(2 / 70, abs=0.03)
    steady = next(row for row in HeadRoles().analyze(trace(mixed())).rows if row["role"] == "dormant")
    assert steady["contrast"] == pytest.approx(0)
    assert steady["contrast_p"] == 1


def test_a_switching_head_is_not_hidden_by_its_mean() -> None:
    row = next(row for row in HeadRoles().analyze(trace(mixed())).rows if row["role"] == "switching")
    assert row["dormancy"] == pytest.approx(32 / 63)
    assert row["queries_above"] == pytest.approx(32 / 63)
    assert row["queries_below"] == pytest.approx(31 / 63)
    assert row["bimodality"] > 0.9
    assert row["prompts_switching"] == 1
    partial = next(row for row in HeadRoles().analyze(trace(mixed())).rows if row["role"] == "partial")
    assert partial["queries_above"] == 0
    assert partial["bimodality"] == 0


def test_a_window_cannot_pass_for_a_choice() -> None:
    """Within the window every query rests on the sink; those beyond cannot see it and do not count."""
    window = 40
    seen = visibility(T, window)
    weights = np.zeros((1, 2, T, T))
    weights[:] = seen / seen.sum(1, keepdims=True)
    weights[0, 1, :window] = 0
    weights[0, 1, :window, 0] = 1
    finding = HeadRoles().analyze(trace([head_record(weights, window=window)]))
    row = next(row for row in finding.rows if row["head"] == 1)
    assert row["role"] == "dormant"
    assert row["queries_above"] == 1
    assert row["queries_below"] == 0


def test_bimodality_equals_sarles_formula() -> None:
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 40, size=(1, 5, 20)).astype(float)
    for head, histogram in enumerate(counts[0]):
        values = np.repeat((np.arange(20) + 0.5) / 20, histogram.astype(int))
        n, z = len(values), (values - values.mean()) / values.std()
        skew = (z**3).mean() * np.sqrt(n * (n - 1)) / (n - 2)
        excess = (n - 1) / ((n - 2) * (n - 3)) * ((n + 1) * ((z**4).mean() - 3) + 6)
        expected = (skew**2 + 1) / (excess + 3 * (n - 1) ** 2 / ((n - 2) * (n - 3)))
        assert bimodality(counts)[0, head] == pytest.approx(expected)


def test_one_domain_one_prompt() -> None:
    finding = HeadRoles().analyze(trace([head_record(maps())]))
    assert any("no contrast between domains" in note for note in finding.notes)
    assert "contrast" not in finding.rows[0]
    assert finding.summary["largest_contrast"] is None
    assert finding.summary["domains"] == {"all prompts": 1}
    assert finding.tiles[0].value == "2 of 12"
    assert finding.tiles[0].note == "on position 0; 1 on some queries only"
    assert finding.verdict.startswith(
        "2 of 12 heads are dormant on position 0 ('t0'); 1 rests on it for some"
    )


def test_no_sink_no_dormant_head() -> None:
    finding = HeadRoles().analyze(trace([record(causal_uniform(L, H, T))]))
    assert finding.status is Status.NOT_FOUND
    assert finding.rows == []
    assert "No head rests on a sink" in finding.verdict


def test_a_sink_that_was_not_looked_at_has_dormancy_alone() -> None:
    finding = HeadRoles().analyze(trace([head_record(maps(9), references=(0, -1))]))
    assert finding.rows[0]["queries_above"] is None
    assert any("No distribution over queries" in note for note in finding.notes)


def test_layers_without_attention_have_no_role() -> None:
    made = head_record(maps())
    for name in ("attention_received", "attention_self", "attention_received_mean", "attention_top1"):
        made.arrays[name] = made.arrays[name].copy()
        made.arrays[name][0] = np.nan
    made.arrays["reference_mass"][0] = -1
    made.arrays["reference_position"][0] = -1
    finding = HeadRoles().analyze(trace([made]))
    assert finding.summary["n_heads"] == 8
    assert all(row["layer"] > 0 for row in finding.rows)


def test_heads_that_rest_on_a_learned_logit_are_counted_apart() -> None:
    weights = maps()
    weights[1, 1] *= 0.03  # the rest of every row goes to the learned sink
    learned = np.zeros((L, H))
    learned[1, 1] = 0.97
    finding = HeadRoles().analyze(trace([head_record(weights, learned_sink_mass=learned)]))
    assert finding.summary["on_learned_sink"] == [[1, 1]]
    assert (1, 1) not in {(row["layer"], row["head"]) for row in finding.rows}
    assert "1 rests on its learned sink logit" in finding.verdict


def test_zeroed_heads_are_told_where_the_run_looked() -> None:
    effect = {"loss_change": {"mean": 0.25, "low": 0.1, "high": 0.4, "n": 8}}
    other = {"loss_change": {"mean": -0.01, "low": None, "high": None, "n": 1}}
    given = trace([head_record(maps())])
    assert "zeroed_heads" not in HeadRoles().analyze(given).summary
    experiment = {
        "kind": "heads",
        "target": {"heads": [[0, 1], [1, 3]]},
        "effect": effect,
        "controls": [{"effect": other}],
    }
    failed = {"kind": "heads", "target": {"heads": [[2, 0]]}, "failed": "no place for it"}
    given.manifest["experiments"] = {"effects": {"experiments": [failed, experiment]}}
    finding = HeadRoles().analyze(given)
    assert finding.summary["zeroed_heads"] == [[0, 1], [1, 3]]
    assert finding.notes[-1] == (
        "Zeroing the strongest sink heads (layer 0 head 1, layer 1 head 3) changes the loss by +0.250 nats per token "
        "(+0.100 to +0.400), zeroing as many other heads by -0.010."
    )


@pytest.mark.parametrize("seed", range(3))
def test_permuting_heads_permutes_roles(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(H)
    plain = HeadRoles().analyze(trace(mixed())).rows
    moved = [head_record(maps(code=i % 2 == 0)[:, order], domain="code" if i % 2 == 0 else "prose", index=i)
             for i in range(8)]  # fmt: skip
    found = {
        (row["layer"], int(order[row["head"]])): row["role"] for row in HeadRoles().analyze(trace(moved)).rows
    }
    assert found == {(row["layer"], row["head"]): row["role"] for row in plain}


def test_short_prompts_are_not_applicable_and_settings_are_checked() -> None:
    assert HeadRoles().analyze(trace([record(causal_uniform(2, 3, 20))])).status is Status.NOT_APPLICABLE
    with pytest.raises(UsageError):
        HeadRoles(active=0.95)
    with pytest.raises(UsageError):
        HeadRoles(share=0.7)
