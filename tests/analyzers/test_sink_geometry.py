"""Golden cases of the sink's geometry: angle, length and drain by construction."""

from __future__ import annotations

import numpy as np
import pytest

from sinklens.analyzers import Status
from sinklens.analyzers.sink_geometry import SinkGeometry
from sinklens.core.errors import UsageError

from .made import causal_uniform, record, trace, with_sink
from .made_heads import head_record

L, H, G, T, D, V, W = 3, 4, 2, 64, 7, 5, 11
SINK_HEADS = {(1, 0), (1, 3), (2, 2)}


def states(seed: int, *, toward: float = 0.0, long: float = 1.0, value: float = 1.0, at: int = 0):
    """Random states; the sink's key in direction of the queries, longer or shorter, its value shrunk."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(L, H, T, D)), rng.normal(size=(L, G, T, D))
    if toward:
        query[..., 0] += toward
        key[:, :, at] = 0
        key[:, :, at, 0] = np.sqrt(D)
    key[:, :, at] *= long
    values = rng.normal(size=(L, G, T, V))
    values[:, :, at] *= value
    return {"query": query, "key": key, "value": values, "out": rng.normal(size=(L, H, V, W))}


def maps(at: int = 0, share: float = 0.9) -> np.ndarray:
    weights = causal_uniform(L, H, T)
    for layer, head in SINK_HEADS:
        with_sink(weights, layer, head, at, share)
    return weights


@pytest.mark.parametrize("at", [0, 5])
def test_numbers_equal_the_plainest_code(at: int) -> None:
    given = [states(seed, toward=3, long=0.4, value=0.1, at=at) for seed in (0, 1)]
    references = (0, -1 if at == 0 else at)
    records = [
        head_record(maps(at), states=given[i], references=references, index=i) for i in range(len(given))
    ]
    finding = SinkGeometry().analyze(trace(records))
    assert {(row["layer"], row["head"]) for row in finding.rows} == SINK_HEADS
    for row in finding.rows:
        layer, head, kv = row["layer"], row["head"], row["head"] // (H // G)
        cosines, others, keys, outs = [], [], [], []
        for made in given:
            q, k, v = made["query"][layer, head], made["key"][layer, kv], made["value"][layer, kv]
            table = (q / np.linalg.norm(q, axis=1)[:, None]) @ (k / np.linalg.norm(k, axis=1)[:, None]).T
            cosines.append(np.mean([table[t, at] for t in range(at + 1, T)]))
            others.append(table[:, [t for t in range(T) if t not in (0, at)]].mean())
            keys.append(np.linalg.norm(k[at]) / np.mean([np.linalg.norm(k[t]) for t in range(T) if t != at]))
            written = [np.linalg.norm(v[t] @ made["out"][layer, head]) for t in range(T)]
            outs.append(written[at] / np.mean([written[t] for t in range(T) if t != at]))
        assert row["cosine"] == pytest.approx(np.mean(cosines))
        assert row["cosine_others"] == pytest.approx(np.mean(others))
        assert row["key_ratio"] == pytest.approx(np.mean(keys))
        assert row["value_out_ratio"] == pytest.approx(np.mean(outs))
        assert row["drained"] is True
    contrasts = [row["cosine"] - row["cosine_others"] for row in finding.rows]
    assert contrasts == sorted(contrasts, reverse=True)


def test_a_key_in_the_queries_direction_is_an_angle_effect() -> None:
    made = head_record(maps(), states=states(2, toward=3, long=0.4, value=0.1))
    finding = SinkGeometry().analyze(trace([made]))
    assert finding.status is Status.FOUND
    assert finding.summary["angle_effect"]
    assert not finding.summary["length_effect"]
    assert "angle effect" in finding.verdict
    assert "although its key is short" in finding.verdict
    assert "drained in 3 of 3 sink heads" in finding.verdict


def test_a_long_key_is_a_length_effect() -> None:
    given = states(3)
    given["query"][...] = given["key"][...] = 1.0  # all cosines are 1
    given["key"][:, :, 0] *= 6
    finding = SinkGeometry().analyze(trace([head_record(maps(), states=given)]))
    assert finding.summary["length_effect"]
    assert not finding.summary["angle_effect"]
    assert "effect of the key's length" in finding.verdict


def test_random_states_show_neither() -> None:
    finding = SinkGeometry().analyze(trace([head_record(maps(), states=states(4))]))
    assert finding.status is Status.NOT_FOUND
    assert "neither" in finding.verdict


def test_the_denominator_leaves_the_sink_out() -> None:
    given = states(5)
    given["value"][...] = 1.0
    given["value"][:, :, 0] *= 1000.0  # with the sink in it, the ratio would be 60, not 1000
    finding = SinkGeometry().analyze(trace([head_record(maps(), states=given)]))
    assert finding.rows[0]["value_ratio"] == pytest.approx(1000)
    assert finding.rows[0]["drained"] is False


def test_a_sink_that_was_not_looked_at_has_norms_but_no_cosine() -> None:
    made = head_record(maps(9), states=states(6, at=9, value=0.1), references=(0, -1))
    finding = SinkGeometry().analyze(trace([made]))
    assert finding.summary["position"] == 9
    assert finding.rows[0]["cosine"] is None
    assert finding.rows[0]["key_ratio"] is not None
    assert any("No cosine for positions [9]" in note for note in finding.notes)
    assert "not among the positions" in finding.verdict


def test_layers_where_the_leader_was_another_have_no_cosine() -> None:
    made = head_record(maps(9), states=states(7, at=9), references=(0, 9))
    made.arrays["reference_position"][1, 1] = 4
    finding = SinkGeometry().analyze(trace([made]))
    assert {row["layer"] for row in finding.rows if row["cosine"] is not None} == {2}


def test_several_sinks_and_prompts_of_different_length() -> None:
    weights = maps()
    with_sink(weights, 0, 1, 7, 0.6)
    records = [
        head_record(weights, states=states(8, toward=3), references=(0, 7)),
        head_record(
            weights[:, :, :40, :40],
            states={k: v if k == "out" else v[:, :, :40] for k, v in states(9, toward=3).items()},
            references=(0, 7),
            index=1,
        ),
    ]
    finding = SinkGeometry().analyze(trace(records))
    assert [sink["position"] for sink in finding.summary["other_sinks"]] == [7]
    assert {(row["position"], row["layer"], row["head"]) for row in finding.rows if row["position"]} == {
        (7, 0, 1)
    }
    assert set(finding.rows[0]) - {"position", "token", "layer", "head"} == set(finding.units)


def test_without_attention_layers_nan_does_not_spread() -> None:
    made = head_record(maps(), states=states(10, toward=3))
    for name in (
        "qk_cosine",
        "qk_cosine_others",
        "key_norm",
        "value_norm",
        "value_out_norm",
        "attention_received",
    ):
        made.arrays[name] = made.arrays[name].copy()
        made.arrays[name][0] = np.nan
    finding = SinkGeometry().analyze(trace([made]))
    assert finding.summary["angle_effect"]


def test_not_applicable() -> None:
    assert SinkGeometry().analyze(trace([record(causal_uniform(2, 3, 20))])).status is Status.NOT_APPLICABLE
    no_sink = SinkGeometry().analyze(trace([record(causal_uniform(2, 3, 64))]))
    assert no_sink.status is Status.NOT_APPLICABLE
    assert "no attention sink" in str(no_sink.reason)
    bare = SinkGeometry().analyze(trace([record(maps())]))
    assert bare.status is Status.NOT_APPLICABLE
    assert "does not show its queries" in str(bare.reason)
    with pytest.raises(UsageError):
        SinkGeometry(drained=0)
