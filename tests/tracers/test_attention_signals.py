"""The signals of the attention seam against their naive definitions, in every kind of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.testbeds.planting.plant import plant
from sinklens.testbeds.planting.truth import SinkPlant
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.ledger import Limits
from sinklens.tracers.record_reading import heads_by_look_back, probe_positions
from sinklens.tracers.record_vectors import gram_matrices, projected_norms, projection_matrix
from sinklens.tracers.signals_pictures import PICTURE_SIGNALS
from sinklens.tracers.signals_visual import OF_PICTURES
from sinklens.tracers.trace import PromptRecord
from tests.testbeds.families import BOS as BED_BOS
from tests.testbeds.families import HEADS as BED_HEADS
from tests.testbeds.families import LAYERS as BED_LAYERS
from tests.testbeds.families import tiny
from tests.tracers.naive_attention import Layer, captured, layers_of, naive, projected, vectors
from tests.tracers.test_families import FAMILIES, batch_of, opened

KINDS = ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2", "gpt_neox", "bert"]
SIGNALS = (
    frozenset(signal for signal in sig.ALL_SIGNALS if signal.source is sig.Source.ATTENTION)
    - OF_PICTURES
    - PICTURE_SIGNALS
)
EVERYTHING = Limits(leading=1000)
"""Every position is kept per head, so that arrays and oracle have the same axes."""
AHEAD = {"local_distance", "future_influence"}
"""Of attention that looks back; in an encoder the look-back distance has no meaning."""


def plan(mode: Mode = Mode.FAITHFUL, **other: Any) -> TracePlan:
    return TracePlan(SIGNALS, mode, limits=EVERYTHING, **other)


def compare(record: PromptRecord, truth: dict[str, np.ndarray], names: set[str], atol: float = 2e-5) -> None:
    assert names
    for name in sorted(names):
        # Without the first token, rows are differences divided by what that token leaves, which may be little.
        loose = 10 if name == "local_distance" else 1
        np.testing.assert_allclose(record[name], truth[name], atol=loose * atol, rtol=2e-5, err_msg=name)


def close_histograms(found: np.ndarray, truth: np.ndarray) -> None:
    """A mass on the edge of a bin may fall on either side."""
    assert np.array_equal(found.sum(-1), truth.sum(-1))
    assert np.abs(np.cumsum(found, -1) - np.cumsum(truth, -1)).max() <= 1


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("length", [7, 131])
@pytest.mark.parametrize("family", KINDS)
def test_every_signal_is_what_its_definition_says(family: str, length: int, mode: Mode) -> None:
    model, batch = opened(family), batch_of(family, length, "right" if length > 9 else None)
    for row, record in enumerate(trace_batch(model, batch, plan(mode)).records):
        truth = naive(layers_of(model, batch, row))
        names = set(truth) - (AHEAD if not FAMILIES[family].causal else set()) - {"reference_mass"}
        compare(record, truth, names)
        close_histograms(record["reference_mass"], truth["reference_mass"])
        places = record["column_entropy_peak_pos"]
        at_peak = np.take_along_axis(truth["column_entropy"], places[..., None], -1)[..., 0]
        np.testing.assert_allclose(at_peak, record["column_entropy_peak"], atol=2e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", [*KINDS, "falcon", "bloom", "gpt_neo"])
def test_a_padded_batch_gives_what_one_by_one_gives(family: str, padding: str) -> None:
    model, batch = opened(family), batch_of(family, 41, padding)
    together = trace_batch(model, batch, plan()).records
    for row, record in enumerate(together):
        ids = batch.inputs["input_ids"][row][batch.valid[row]][None]  # type: ignore[index]
        if padding == "left" and family in ("gpt2", "gpt_neo", "bert"):
            continue  # these number their positions from the first place of a row, padding or not
        alone = trace_batch(model, Batch({"input_ids": ids}, torch.ones_like(ids).bool()), plan()).records[0]
        assert alone.arrays.keys() == record.arrays.keys()
        for name, array in alone.arrays.items():
            if name in ("first_mass", "reference_mass"):
                close_histograms(record[name], array)
            elif not name.endswith("_pos"):
                np.testing.assert_allclose(record[name], array, atol=1e-4, rtol=1e-4, err_msg=name)


def test_the_leader_is_the_position_that_received_most_in_the_blocks_before() -> None:
    model, batch = opened("llama"), batch_of("llama", 61, "left")
    for record in trace_batch(model, batch, plan()).records:
        places, received = record[sig.REFERENCE_POSITION], record[sig.ATTENTION_RECEIVED_MEAN]
        assert places[:, 0].tolist() == [0] * 4
        assert places[0, 1] == -1
        for layer in range(1, 4):
            total = received[:layer].sum(0)
            candidates = range(1, len(record) - 15)
            assert places[layer, 1] == max(candidates, key=lambda k: total[k])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_sink_leads_from_the_block_after_its_first(seed: int) -> None:
    token, at = 83, 11 + 7 * seed
    module = tiny("llama", seed)
    plant(module, sinks=[SinkPlant([(1, 0), (1, 3), (1, 4), (4, 2)], token=token)], seed=seed)
    info = ModelInfo("llama", None, "llama", BED_LAYERS, BED_HEADS, 3, 60, 0, "float32")
    model = OpenedModel(module, None, find_anatomy(module), info)
    ids = torch.randint(8, token, (1, 61), generator=torch.Generator().manual_seed(seed))
    ids[0, 0], ids[0, at] = BED_BOS, token
    record = trace_batch(model, Batch({"input_ids": ids}, torch.ones_like(ids).bool()), plan()).records[0]
    assert record[sig.REFERENCE_POSITION][2:, 1].tolist() == [at] * (BED_LAYERS - 2)
    mass, cosine = record[sig.REFERENCE_MASS][4, :, 1], record[sig.QK_COSINE][4, :, 1]
    assert mass[2, -1] == mass[2].sum() == 60 - at
    assert mass[[0, 1, 3, 4, 5], -1].sum() == 0
    assert cosine[2] > record[sig.QK_COSINE_OTHERS][4, 2] + 0.5


def test_a_causal_prompt_too_short_for_a_leader_has_none() -> None:
    model, batch = opened("llama"), batch_of("llama", 7)
    record = trace_batch(model, batch, plan()).records[0]
    assert (record[sig.REFERENCE_POSITION][:, 1] == -1).all()
    assert (record[sig.REFERENCE_MASS][:, :, 1] == -1).all()
    assert np.isnan(record[sig.QK_COSINE][..., 1]).all()
    assert np.isfinite(record[sig.QK_COSINE][..., 0]).all()
    assert np.isnan(record[sig.FUTURE_INFLUENCE]).all()


def test_one_token_is_a_prompt_too() -> None:
    model, ids = opened("llama"), torch.tensor([[1]])
    record = trace_batch(model, Batch({"input_ids": ids}, torch.ones_like(ids).bool()), plan()).records[0]
    assert record[sig.PREFIX_MAP][:, 0, 0] == pytest.approx(1.0)
    assert np.isnan(record[sig.QK_COSINE_OTHERS]).all()
    assert (record[sig.ATTENTION_ENTROPY_NORMALISED] == 0).all()


def test_bidirectional_attention_has_no_prefix_map() -> None:
    model, batch = opened("bert"), batch_of("bert", 29, "right")
    for record in trace_batch(model, batch, plan()).records:
        assert np.isnan(record[sig.PREFIX_MAP]).all()
        assert np.isnan(record[sig.PREFIX_LOGITS]).all()


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_neo", "codegen", "mpt"])
def test_families_read_from_their_weights_give_what_weights_can_give(family: str) -> None:
    model, batch = opened(family), batch_of(family, 131, "right")
    records = trace_batch(model, batch, plan()).records
    with torch.no_grad():
        maps = model.module(**batch.inputs, output_attentions=True).attentions
    for row, record in enumerate(records):
        n = len(record[sig.ATTENTION_RECEIVED_PEAK])
        own = [weights[row, :, :n, :n].double().numpy() for weights in maps]
        truth = naive([Layer(A, (A > 0).any(0)) for A in own])
        compare(record, truth, set(truth) - {"reference_mass"})
        for name in ("key_norm", "qk_cosine", "value_out_norm", "prefix_logits"):
            assert name not in record.arrays


@pytest.mark.parametrize("family", ["falcon", "falcon_alibi"])
def test_families_that_call_the_kernel_themselves_give_everything(family: str, monkeypatch: Any) -> None:
    model, batch = opened(family), batch_of(family, 131, "right")
    record = trace_batch(model, batch, plan()).records[1]
    n, found = len(record), []

    def dense(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, **other: Any) -> Tensor:
        group = q.shape[1] // k.shape[1]
        wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
        hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask < -1e30
        bias = 0.0 if attn_mask.dtype == torch.bool else attn_mask.double()
        logits = (q.double() @ wide_k.double().mT * q.shape[-1] ** -0.5 + bias).masked_fill(
            hidden, -torch.inf
        )
        A = logits.softmax(-1)
        path = str(model.anatomy.main.blocks[len(found)].attention_output)
        inner, logits = A[1, :, :n, :n].numpy(), logits[1, :, :n, :n].numpy()
        vectors_of = [x[1, :, :n].double().numpy() for x in (q, wide_k, wide_v)]
        layer = Layer(
            inner, (inner > 0).any(0), logits, project=model.module.get_submodule(path), group=group
        )
        layer.q, layer.k, layer.v = vectors_of
        found.append(layer)
        return (A @ wide_v.double()).to(v.dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", dense)
    forward(model.module, batch)
    monkeypatch.undo()
    truth = naive(found)
    compare(record, truth, set(truth) - {"reference_mass"})
    close_histograms(record["reference_mass"], truth["reference_mass"])


def heads_written(model: Any, batch: Batch) -> list[tuple[nn.Module, Tensor]]:
    """The output projections and what they were given."""
    seen: list[tuple[nn.Module, Tensor]] = []
    paths = [block.attention_output for block in model.anatomy.main.blocks]
    handles = [
        model.module.get_submodule(path).register_forward_hook(lambda m, args, _: seen.append((m, args[0])))
        for path in paths
    ]
    forward(model.module, batch)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["bloom", "gpt_neo", "falcon", "mpt"])
def test_what_heads_write_is_known_without_their_values(family: str) -> None:
    model, batch = opened(family), batch_of(family, 23)
    record = trace_batch(model, batch, plan()).records[1]
    for layer, (module, given) in enumerate(heads_written(model, batch)):
        x = given.reshape(2, 23, 4, -1)[1].transpose(0, 1).double().numpy()
        expected = projected(Layer(np.zeros((4, 23, 23)), np.zeros((23, 23)), project=module), x).mean(-1)
        np.testing.assert_allclose(record[sig.HEAD_OUTPUT_NORM][layer], expected, rtol=2e-5)


def test_a_gate_before_the_output_projection_is_part_of_what_heads_write() -> None:
    model, batch = opened("llama"), batch_of("llama", 19)
    plain = trace_batch(model, batch, plan()).records[0]
    path = model.anatomy.main.blocks[-1].attention_output
    gate = torch.tensor([0.0, 1.0, 2.0, 0.5]).repeat_interleave(16)
    handle = model.module.get_submodule(path).register_forward_pre_hook(  # type: ignore[arg-type]
        lambda module, args: (args[0] * gate,)
    )
    gated = trace_batch(model, batch, plan()).records[0]
    handle.remove()
    ratio = gated[sig.HEAD_OUTPUT_NORM][-1] / plain[sig.HEAD_OUTPUT_NORM][-1]
    np.testing.assert_allclose(ratio, [0.0, 1.0, 2.0, 0.5], atol=1e-5)
    np.testing.assert_allclose(gated[sig.VALUE_OUT_NORM], plain[sig.VALUE_OUT_NORM])


def test_a_projection_that_cannot_be_read_leaves_the_layer_empty() -> None:
    model, batch = opened("llama"), batch_of("llama", 19)
    path = str(model.anatomy.main.blocks[2].attention_output)
    parent, _, name = path.rpartition(".")
    wrapped = nn.Sequential(model.module.get_submodule(path))
    setattr(model.module.get_submodule(parent), name, wrapped)
    record = trace_batch(model, batch, plan()).records[0]
    for signal in (sig.HEAD_OUTPUT_NORM, sig.VALUE_OUT_NORM, sig.VALUE_OUT_NORM_MEAN):
        assert np.isnan(record[signal][2]).all()
        assert np.isfinite(record[signal][[0, 1, 3]]).all()


def test_quantised_projections_are_not_read() -> None:
    linear = nn.Linear(12, 7)
    assert projection_matrix(linear) is not None
    linear.weight = nn.Parameter(torch.zeros(7, 12, dtype=torch.int8), requires_grad=False)
    assert projection_matrix(linear) is None
    linear.weight = nn.Parameter(torch.zeros(7, 12, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert projection_matrix(linear) is None
    assert projection_matrix(nn.Linear(12, 7, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_of_any_precision_are_measured_in_single(dtype: torch.dtype) -> None:
    model, batch = opened("llama", dtype), batch_of("llama", 61, "left")
    for row, record in enumerate(trace_batch(model, batch, plan()).records):
        places = torch.nonzero(batch.valid[row])[:, 0]  # type: ignore[index]
        refs = record[sig.REFERENCE_POSITION].tolist()
        for layer, call in enumerate(captured(model, batch)):
            q, k, v = (x[row][:, places].double().numpy() for x in (call.query, call.key, call.value))
            k, v = (np.repeat(x, 2, 0) for x in (k, v))
            n, path = len(places), str(model.anatomy.main.blocks[layer].attention_output)
            weight = model.module.get_submodule(path).weight.double().detach().numpy()  # type: ignore[union-attr]
            truth = vectors(
                Layer(np.zeros((4, n, n)), np.ones((n, n), bool), np.zeros((4, n, n)), q, k, v, None, 2),
                refs[layer],
            )
            truth["value_out_norm"] = np.linalg.norm(
                np.einsum("hnd,ohd->hno", v, weight.reshape(64, 4, 16)), axis=-1
            )
            for name in ("qk_cosine", "qk_cosine_others", "key_norm", "key_norm_mean", "value_out_norm"):
                np.testing.assert_allclose(
                    record[name][layer], truth[name], atol=1e-5, rtol=1e-5, err_msg=name
                )


def test_norms_behind_a_projection_come_from_its_gram_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(6 * 5, 17, generator=generator)
    x = torch.randn(3, 2, 11, 5, generator=generator)
    found = projected_norms(x, gram_matrices(matrix, 6))
    for head in range(6):
        expected = (x[:, head // 3] @ matrix[head * 5 : (head + 1) * 5]).norm(dim=-1)
        torch.testing.assert_close(found[:, head], expected, rtol=1e-5, atol=1e-6)


def test_probes_are_the_last_tokens_and_as_many_others() -> None:
    for length in (1, 2, 19, 40, 997):
        probes, count = probe_positions(length).tolist(), max(1, length // 20)
        assert probes == sorted(set(probes))
        assert len(probes) == min(length, 2 * count)
        assert probes[-count:] == list(range(length - count, length))
    assert probe_positions(997).tolist() == probe_positions(997).tolist()


def test_heads_of_layers_without_attention_are_never_chosen() -> None:
    back = np.array([[5.0, 1.0], [np.nan, np.nan], [3.0, 9.0]])
    near, far = heads_by_look_back(back)
    assert near.tolist() == [[False, True], [False, False], [False, False]]
    assert far.tolist() == [[False, False], [False, False], [False, True]]


def test_only_what_is_wanted_is_recorded() -> None:
    model, batch = opened("llama"), batch_of("llama", 29, "right")
    record = trace_batch(model, batch, TracePlan(frozenset({sig.TAIL_PEAK}))).records[0]
    assert record.arrays.keys() == {"visible_queries", "tail_peak", "tail_peak_pos"}


def test_any_signal_alone_is_what_it_is_among_all() -> None:
    model, batch = opened("gpt_oss"), batch_of("gpt_oss", 61, "right")
    together = trace_batch(model, batch, plan()).records[1]
    for signal in SIGNALS:
        one = TracePlan(frozenset({signal}), limits=EVERYTHING)
        alone = trace_batch(model, batch, one).records[1]
        np.testing.assert_allclose(alone[signal], together[signal], rtol=1e-6, err_msg=signal.name)
