"""What writes the residual stream, against hooks on hand-picked modules and one number at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.inputs.spec import Prompt
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import Batch, collate
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.trace import PromptRecord
from tests.families import FAMILIES

from .naive_states import WRITERS, NaiveBlock, down_of, inner_of, strongest, watch
from .test_families import batch_of, opened

STATES = frozenset(
    signal
    for signal in sig.ALL_SIGNALS
    if signal.source in (sig.Source.RESIDUAL, sig.Source.EXPERTS, sig.Source.DOWN_PROJ)
)
HALF = sig.ENTRIES // 2
PADDED = [name for name in WRITERS if name != "falcon"]  # its left padding moves positions in place


def cases() -> list[tuple[str, str | None]]:
    sides: tuple[str, ...] = ("left", "right")
    return [(name, sides[i % 2] if FAMILIES[name].padding else None) for i, name in enumerate(WRITERS)]


def real_rows(batch: Batch, row: int) -> Tensor:
    assert batch.valid is not None
    return batch.valid[row].nonzero().squeeze(-1)


@pytest.mark.parametrize(("family", "padding"), cases())
def test_entries_and_their_sum(family: str, padding: str | None) -> None:
    """Which entries, and what each of the three terms is; after = before + attention + mlp to rounding."""
    model, batch = opened(family), batch_of(family, 17, padding)
    records = trace_batch(model, batch, TracePlan(signals=STATES)).records
    blocks = watch(model.module, family, batch)
    for row, record in enumerate(records):
        rows = real_rows(batch, row)
        for layer, block in enumerate(blocks):
            expected = [
                *strongest(block.after[row][rows], HALF),
                *strongest(block.before[row][rows], HALF),
            ]
            places = list(
                zip(record["residual_after_pos"][layer], record["residual_after_dim"][layer], strict=True)
            )
            assert places == expected
            for name, naive in (
                ("residual_after", block.after),
                ("residual_before", block.before),
                ("attention_write", block.attention),
                ("mlp_write", block.mlp),
            ):
                values = [float(naive[row][rows][place]) for place in expected]
                np.testing.assert_allclose(record[name][layer], values, rtol=1e-5, atol=1e-6)
        error = (
            record["residual_after"]
            - record["residual_before"]
            - record["attention_write"]
            - record["mlp_write"]
        )
        size = sum(
            abs(record[name])
            for name in ("residual_after", "residual_before", "attention_write", "mlp_write")
        )
        assert np.max(np.abs(error) / size) <= 1e-5


def naive_writer(block: NaiveBlock, place: int, dim: int, mlp: float) -> tuple[int, float, int, float]:
    """Expert, its part, neuron and its part of one entry, by trying all."""
    if block.experts is None:
        assert block.product is not None
        assert block.weight is not None
        parts = block.product.reshape(-1, block.product.shape[-1])[place] * block.weight[dim]
        neuron = int(parts.abs().argmax())
        return -1, float("nan"), neuron, float(parts[neuron])
    module, hidden, chosen, weights = block.experts
    found: dict[int, tuple[float, int, float]] = {}
    for slot, expert in enumerate(chosen[place].tolist()):
        inner = inner_of(module, expert, hidden[place])
        down, bias = down_of(module, expert)
        y = (down @ inner + bias)[dim] * weights[place, slot]
        parts = inner * down[dim]
        neuron = int(parts.abs().argmax())
        found[expert] = (float(y), neuron, float(parts[neuron]))
    if block.product is not None:  # shared experts add the rest
        assert block.weight is not None
        parts = block.product.reshape(-1, block.product.shape[-1])[place] * block.weight[dim]
        neuron = int(parts.abs().argmax())
        found[-1] = (mlp - sum(value for value, *_ in found.values()), neuron, float(parts[neuron]))
    best = max(found, key=lambda expert: abs(found[expert][0]))
    return best, *found[best]


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 23])
@pytest.mark.parametrize(("family", "padding"), cases())
def test_neurons_and_experts(family: str, padding: str | None, length: int) -> None:
    """Looked up where the feed-forward part adds at least a tenth, and nowhere else."""
    model, batch = opened(family), batch_of(family, length, padding, batch=3)
    with torch.no_grad():  # so that the feed-forward part matters
        for name, parameter in model.module.named_parameters():
            if any(part in name for part in ("down_proj", "dense_4h_to_h", "fc2", "post_feedforward")):
                parameter.mul_(3).add_(9.0 if "norm" in name else 0.0)
    records = trace_batch(model, batch, TracePlan(signals=STATES)).records
    blocks = watch(model.module, family, batch)
    looked_up = 0
    for row, record in enumerate(records):
        rows, width = real_rows(batch, row), batch.inputs["input_ids"].shape[1]
        for layer, block in enumerate(blocks):
            for entry in range(sig.ENTRIES):
                mlp = float(record["mlp_write"][layer, entry])
                most = max(
                    abs(record["residual_after"][layer, entry]), abs(record["residual_before"][layer, entry])
                )
                found = (
                    int(record["write_expert"][layer, entry]),
                    float(record["write_expert_value"][layer, entry]),
                    int(record["write_neuron"][layer, entry]),
                    float(record["write_neuron_value"][layer, entry]),
                )
                if abs(mlp) < 0.1 * most:
                    assert found[0] == found[2] == -1
                    assert np.isnan([found[1], found[3]]).all()
                    continue
                pos, dim = (int(record[f"residual_after_{axis}"][layer, entry]) for axis in ("pos", "dim"))
                expected = naive_writer(block, row * width + int(rows[pos]), dim, mlp)
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)
                looked_up += 1
    assert looked_up > 0


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", PADDED)
def test_a_padded_batch_equals_its_prompts_one_by_one(family: str, side: Any) -> None:
    model, generator = opened(family), torch.Generator().manual_seed(4)
    prompts = []
    for index, length in enumerate((19, 11, 14)):
        ids = (1, *torch.randint(5, 300, (length - 1,), generator=generator).tolist())
        prompts.append(Prompt(index, ids, ("",) * length, "test"))
    plan = TracePlan(signals=STATES)
    together = trace_batch(model, collate(prompts, side=side), plan).records
    for prompt, record in zip(prompts, together, strict=True):
        alone = trace_batch(model, collate([prompt]), plan).records[0]
        assert record.arrays.keys() == alone.arrays.keys()
        for name, value in alone.arrays.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(record[name], value, rtol=1e-3, atol=2e-4, err_msg=name)
            else:
                assert np.array_equal(record[name], value), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "gpt2"])
def test_cosines_with_the_references(family: str) -> None:
    """Slot 0 is the first token; without attention slot 1 is the largest norm among the others, block by block."""
    model, batch = opened(family), batch_of(family, 15, "left")
    records = trace_batch(model, batch, TracePlan(signals=STATES)).records
    for layer, block in enumerate(watch(model.module, family, batch)):
        for row, record in enumerate(records):
            state = block.after[row][real_rows(batch, row)].double()
            norm = state.norm(dim=-1)
            leader = 1 + int(norm[1:].argmax())
            for slot, reference in enumerate((0, leader)):
                expected = state @ state[reference] / (norm * norm[reference])
                np.testing.assert_allclose(record["residual_cosine"][layer, slot], expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "bert"])
def test_one_token_and_inference_mode(family: str) -> None:
    """A prompt of one token has no leader; inference mode changes nothing."""
    model = opened(family)
    one = Batch({"input_ids": torch.tensor([[7]])}, torch.ones(1, 1, dtype=torch.bool))
    record = trace_batch(model, one, TracePlan(signals=STATES)).records[0]
    np.testing.assert_allclose(record["residual_cosine"][:, 0, 0], 1, atol=1e-6)
    assert np.isnan(record["residual_cosine"][:, 1]).all()
    assert (record["birth_layer"] == -1).all()
    batch = batch_of(family, 13)
    plain = trace_batch(model, batch, TracePlan(signals=STATES)).records[1]
    with torch.inference_mode():
        again = trace_batch(model, batch, TracePlan(signals=STATES)).records[1]
    for name, value in plain.arrays.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_nothing_is_looked_at_that_nobody_wants() -> None:
    model = opened("qwen3_moe")
    batch = batch_of("qwen3_moe", 13, "right")
    plan = TracePlan(signals=frozenset({sig.RESIDUAL_COSINE, sig.ROUTER_FREQUENCY_OTHERS}))
    record: PromptRecord = trace_batch(model, batch, plan).records[0]
    assert record.arrays.keys() == {"residual_norm", "residual_cosine", "router_frequency_others"}
    assert not any(block.sum.checked for block in model.anatomy.main.blocks)


def test_where_the_sum_is_not_known_nothing_is_attributed() -> None:
    """A block that multiplies its output: the terms do not add up, and the trace says so by NaN."""
    from tests.families import build

    module = build("llama")
    for layer in module.model.layers[1:2]:
        plain = layer.forward
        layer.forward = lambda *args, plain=plain, **kwargs: plain(*args, **kwargs) * 1.5
    model = OpenedModel(
        module, None, find_anatomy(module), ModelInfo("llama", None, "llama", 4, 4, 2, 64, 0, "")
    )
    record = trace_batch(model, batch_of("llama", 13), TracePlan(signals=STATES)).records[0]
    assert [block.sum.exact for block in model.anatomy.main.blocks] == [True, False, True, True]
    for name in ("attention_write", "mlp_write", "write_neuron_value"):
        assert np.isnan(record[name][1]).all()
        assert not np.isnan(record[name][0]).all()
    assert not np.isnan(record["residual_before"]).any()
    assert (record["write_neuron"][1] == -1).all()
