"""Analyzers of heads on traced models give what they give on the models' own full attention maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sinklens.analyzers import registry
from sinklens.analyzers.base import Finding, Status
from sinklens.analyzers.heads import Sink, mean
from sinklens.analyzers.sink_geometry import SinkGeometry, measure
from sinklens.tracers.attention import Mode
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.record_reading import probe_positions
from sinklens.tracers.trace import Trace, layer_table
from tests.tracers.naive_attention import layers_of, projected
from tests.tracers.test_families import batch_of, opened

from .made import trace
from .made_heads import head_record

T = 131
NAMES = (
    "head-roles", "head-classes", "attention-entropy", "window-shares", "normalised-attention",
    "attention-concentration", "mean-maps",
)  # fmt: skip


def traced_and_made(family: str, mode: Mode) -> tuple[Trace, Trace]:
    """One padded batch traced, and the same prompts as full maps."""
    model, batch = opened(family), batch_of(family, T, "left")
    wanted = frozenset().union(*(registry[name].needs for name in NAMES))
    records = trace_batch(model, batch, TracePlan(wanted, mode)).records
    made = []
    for row, record in enumerate(records):
        layers = layers_of(model, batch, row)
        logits = np.stack([np.broadcast_to(layer.logits, layer.A.shape) for layer in layers])  # type: ignore[arg-type]
        hidden = np.zeros((len(layers), len(record), 3))
        made.append(
            head_record(
                np.stack([layer.A for layer in layers]),
                hidden=hidden,
                logits=logits,
                probes=probe_positions(len(record)).numpy(),
                seen=layers[0].seen,
                index=record.index,
                pieces=list(record.pieces),
            )
        )
        made[-1].arrays["residual_norm"] = record["residual_norm"]
    return Trace(model.info, layer_table(model.anatomy.main), records), trace(made)


def close(found: Finding, expected: Finding) -> None:
    assert found.status is expected.status is not Status.NOT_APPLICABLE
    by_place = [{(row["layer"], row.get("head")): row for row in f.rows} for f in (found, expected)]
    assert by_place[0].keys() == by_place[1].keys()
    for place, row in by_place[1].items():
        for key, value in row.items():
            same(by_place[0][place][key], value, f"{found.analyzer} {place} {key}")


def same(found: Any, expected: Any, what: str) -> None:
    if isinstance(expected, float) and found is not None:
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), what
    else:
        assert found == expected, what


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_traced_models_give_what_full_maps_give(family: str, mode: Mode) -> None:
    traced, made = traced_and_made(family, mode)
    for name in NAMES:
        close(registry[name]().analyze(traced), registry[name]().analyze(made))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "gpt2", "deepseek_v3", "bloom"])
def test_every_family_gets_an_answer_or_a_reason(family: str) -> None:
    model, batch = opened(family), batch_of(family, T)
    names = [name for name, cls in registry.items() if 40 <= cls.place < 70]
    wanted = frozenset().union(*(registry[name].needs for name in names))
    records = trace_batch(model, batch, TracePlan(wanted)).records
    given = Trace(model.info, layer_table(model.anatomy.main), records)
    for name in names:
        finding = registry[name]().analyze(given)
        assert finding.verdict.endswith("."), name
        assert (finding.reason is None) == (finding.status is not Status.NOT_APPLICABLE)


def test_an_encoder_has_no_look_back() -> None:
    model, batch = opened("bert"), batch_of("bert", 100)
    names = [name for name, cls in registry.items() if 40 <= cls.place < 70]
    wanted = frozenset().union(*(registry[name].needs for name in names))
    records = trace_batch(model, batch, TracePlan(wanted)).records
    given = Trace(model.info, layer_table(model.anatomy.main), records)
    for name in names:
        finding = registry[name]().analyze(given)
        if name in ("waad", "fai", "head-classes", "window-shares"):
            assert "only looks back" in str(finding.reason), name


@pytest.mark.parametrize("at", [0, 9])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_geometry_is_what_queries_keys_and_values_say(family: str, at: int) -> None:
    model, batch = opened(family), batch_of(family, 61, "right")
    records = trace_batch(model, batch, TracePlan(SinkGeometry.needs)).records
    heads = np.ones((len(model.anatomy.main.blocks), records[0]["attention_received"].shape[1]), dtype=bool)
    found = measure(Sink(at, "t", heads, tuple(records)))
    expected: dict[str, list[np.ndarray]] = {"key": [], "value": [], "value_out": [], "cosine": []}
    for row, record in enumerate(records):
        layers = layers_of(model, batch, row)
        looked_at = (record["reference_position"] == at).any(1)
        for key, norms in (
            ("key", [np.linalg.norm(x.k, axis=-1) for x in layers]),  # type: ignore[arg-type]
            ("value", [np.linalg.norm(x.v, axis=-1) for x in layers]),  # type: ignore[arg-type]
            ("value_out", [projected(x, x.v) for x in layers]),  # type: ignore[arg-type]
        ):
            expected[key].append(np.stack([n[:, at] / np.delete(n, at, axis=1).mean(1) for n in norms]))
        cosines = []
        for layer, seen in zip(layers, looked_at, strict=True):
            assert layer.q is not None
            assert layer.k is not None
            unit_q, unit_k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (layer.q, layer.k))
            cosine = (unit_q[:, at + 1 :] * unit_k[:, [at]]).sum(-1).mean(-1)
            cosines.append(cosine if seen else np.full(len(cosine), np.nan))
        expected["cosine"].append(np.stack(cosines))
    for key, values in expected.items():
        np.testing.assert_allclose(getattr(found, key), mean(values), rtol=2e-3, atol=2e-4, err_msg=key)
    if at == 0:
        assert not np.isnan(found.cosine).any()
