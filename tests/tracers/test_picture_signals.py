"""Signals of visual tokens against the plainest code: dense maps, sorted cosines, singular values of a matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sinklens.inputs.spans import Kind
from sinklens.kernels.reference import dense_logits, dense_visibility
from sinklens.kernels.rows import runs, weights_of_rows
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, BlockPlan, Want
from sinklens.tracers import signals_pictures as pic
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics
from sinklens.tracers.batch import first_tensor, forward
from sinklens.tracers.executor import TracePlan, sites, trace_batch
from sinklens.tracers.lens import CHUNK, Vocabulary, nearest_tokens, repeated_rows, vocabulary
from sinklens.tracers.record_pictures import first_text, query_entropy
from sinklens.tracers.recorder import Limits
from tests.families import IMAGE, PAD
from tests.pictures import VLMS, batch_for, opened_vlm, picture_prompt
from tests.tracers.test_families import batch_of, opened, settings

families = pytest.mark.parametrize("family", VLMS)
PLAN = TracePlan(pic.PICTURE_SIGNALS, limits=Limits(lens_every=2))


def dense_maps(model: Any, batch: Any) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights `[head, query, key]`, visibility and queries of every layer."""
    maps, seen, queries = [], [], []

    def keep(site: Site, call: AttentionCall, output: torch.Tensor) -> torch.Tensor:
        sizes = sizes_of(call, Want(frozenset()))
        visible = dense_visibility(call, sizes)
        maps.append(dense_logits(call, sizes, visible).softmax(-1).nan_to_num(0.0)[0])
        seen.append(visible[0].any(0))
        queries.append(call.query[0].double())
        return output

    tap = AttentionTap(sites(model.module, model.anatomy.main, "attention"), no_statistics, ignore, edit=keep)
    with tap.attached(model.module):
        forward(model.module, batch)
    return maps, seen, queries


@families
def test_what_text_and_pictures_give_visual_tokens_equals_the_dense_maps(family: str) -> None:
    model, prompt = opened_vlm(family), picture_prompt(family, 23)
    batch = batch_for(prompt)
    assert prompt.visual is not None
    spans = prompt.visual.spans
    record = trace_batch(model, batch, PLAN).records[0]
    maps, seen, queries = dense_maps(model, batch)
    text, visual = spans.is_(Kind.QUESTION).nonzero()[0], spans.visual.nonzero()[0]
    for layer, (weights, visible) in enumerate(zip(maps, seen, strict=True)):
        a = weights.numpy()
        received = record[pic.QUERIES_RECEIVED][layer]
        np.testing.assert_allclose(received[0], a[:, text].mean(0).sum(0), atol=2e-5)
        np.testing.assert_allclose(received[1], a[:, -1].mean(0), atol=1e-5)
        assert not received[2].any()
        np.testing.assert_array_equal(record[pic.QUERIES_VISIBLE][layer][0], visible[text].sum(0))
        for slot, rows in enumerate((text, visual)):
            count = np.maximum(visible.numpy()[np.ix_(rows, visual)].sum(0), 1)
            largest = a[:, rows][:, :, visual].max(0).sum(0) / count
            np.testing.assert_allclose(record[pic.HEAD_MAX_RECEIVED][layer][slot], largest, atol=1e-5)
        rises = np.maximum(np.diff(a[:, text][:, :, visual], axis=1), 0)
        kept = np.argsort(-rises.sum((1, 2)), kind="stable")[: len(a) // 2]
        np.testing.assert_allclose(record[pic.GAZE_SHIFT][layer], rises[kept].mean((0, 1)), atol=1e-5)
        for place, token in enumerate(visual):
            z = queries[layer][:, token].numpy()
            z = z - z.mean(0)
            values = np.maximum(np.linalg.eigvalsh(z @ z.T / len(z)), 1e-10)
            share = values / values.sum()
            wanted = [-(v * np.log(v)).sum() / math.log(len(z)) for v in (values, share)]
            np.testing.assert_allclose(
                record[pic.QUERY_ENTROPY][layer][:, place], wanted, rtol=1e-3, atol=1e-5
            )


@families
def test_states_that_enter_blocks_are_measured_where_they_enter(family: str) -> None:
    model, prompt = opened_vlm(family), picture_prompt(family, 17)
    batch = batch_for(prompt)
    assert prompt.visual is not None
    spans, entered = prompt.visual.spans, {}
    handles = []
    for block in model.anatomy.main.blocks:
        module = model.module.get_submodule(block.path)
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, layer=block.index: entered.__setitem__(layer, args[0][0].double())
            )
        )
    record = trace_batch(model, batch, PLAN).records[0]
    for handle in handles:
        handle.remove()
    visual = spans.visual.nonzero()[0]
    unit = {layer: x / x.norm(dim=1, keepdim=True) for layer, x in entered.items()}
    first = first_text(spans)
    np.testing.assert_allclose(record[pic.VISUAL_UNIT], unit[0][visual], atol=1e-3)
    assert record[pic.VISUAL_UNIT].dtype == np.float16
    for layer in entered:
        np.testing.assert_allclose(
            record[pic.VISUAL_DRIFT][layer], (unit[layer][visual] * unit[0][visual]).sum(1), atol=1e-5
        )
        np.testing.assert_allclose(
            record[pic.VISUAL_FIRST_COSINE][layer], unit[layer][visual] @ unit[layer][first], atol=1e-5
        )
    values = np.linalg.svd(entered[0][visual].numpy(), compute_uv=False)
    np.testing.assert_allclose(record[pic.VISUAL_SPECTRUM][0], values, rtol=1e-4, atol=1e-5)
    module: Any = model.module
    matrix = module.get_input_embeddings().weight.detach().double()
    words = matrix / matrix.norm(dim=1, keepdim=True)
    for layer in (0, 2):
        cosine = (unit[layer][visual] @ words.T).numpy()
        cosine[:, [PAD, IMAGE, 313]] = -2
        if family in ("llava", "gemma3"):
            cosine[:, 313] = (unit[layer][visual] @ words[313]).numpy()  # no placeholder there
        wanted = -np.sort(-cosine, axis=1)[:, : pic.LENS_RANKS]
        np.testing.assert_allclose(record[pic.LENS_COSINE][layer], wanted, atol=1e-5)
        np.testing.assert_allclose(
            np.take_along_axis(cosine, record[pic.LENS_ID][layer].astype(int), 1), wanted, atol=1e-5
        )
    assert np.isnan(record[pic.LENS_COSINE][[1, 3]]).all()
    assert record[pic.LENS_EXCLUDED][0] == 1


@families
def test_transitions_compare_what_enters_and_leaves_sublayers(family: str) -> None:
    model, prompt = opened_vlm(family), picture_prompt(family, 17)
    batch, seen, handles = batch_for(prompt), {}, []
    for block in model.anatomy.main.blocks:
        for part, name in enumerate(("self_attn", "mlp")):

            def keep(m: Any, args: Any, kwargs: Any, out: Any, key: Any = (block.index, part)) -> None:
                given = args[0] if args else kwargs["hidden_states"]
                seen[key] = given[0].double(), (out[0] if isinstance(out, tuple) else out)[0].double()

            handles.append(
                model.module.get_submodule(f"{block.path}.{name}").register_forward_hook(
                    keep, with_kwargs=True
                )
            )
    record = trace_batch(model, batch, PLAN).records[0]
    for handle in handles:
        handle.remove()
    for (layer, part), (x, y) in seen.items():
        np.testing.assert_allclose(
            record[pic.TRANSITION_RATIO][layer, part], y.norm(dim=1) / x.norm(dim=1), rtol=1e-4
        )
        np.testing.assert_allclose(
            record[pic.TRANSITION_COSINE][layer, part], torch.cosine_similarity(x, y), atol=1e-5
        )


@families
def test_recording_leaves_the_model_as_it_was(family: str) -> None:
    model, batch = opened_vlm(family), batch_for(picture_prompt(family))
    output = first_tensor(forward(model.module, batch))
    before = settings(
        model.module
    )  # after a pass: transformers has hooks of its own, put on by the first one
    run = trace_batch(model, batch, PLAN)
    assert torch.equal(first_tensor(run.output), output)
    assert settings(model.module) == before


def test_text_has_none_of_it() -> None:
    model, batch = opened("llama"), batch_of("llama", 9)
    record = trace_batch(model, batch, PLAN).records[0]
    assert not record.arrays.keys() & {signal.name for signal in pic.PICTURE_SIGNALS}


@pytest.mark.parametrize("causal", [True, False])
def test_weights_of_rows_are_the_dense_weights(causal: bool) -> None:
    """Co-prime sizes, grouped heads, a soft cap, learned sinks, a window as a mask, blocks of a row or two."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, h, 23, 5, generator=generator) for h in (6, 3, 3))
    distance = torch.arange(23)[:, None] - torch.arange(23)
    mask = ((distance >= 0) & (distance < 7))[None, None]
    for given in (None, mask):
        call = AttentionCall(
            query,
            key,
            value,
            0.3,
            causal=causal,
            mask=given,
            softcap=2.0,
            learned_sinks=torch.randn(6, generator=generator),
        )
        sizes = sizes_of(call, Want(frozenset()))
        visible = dense_visibility(call, sizes)
        logits = dense_logits(call, sizes, visible)
        norm = torch.logaddexp(logits.logsumexp(-1), call.learned_sinks.double()[:, None])  # type: ignore[union-attr]
        wanted = (logits - norm[..., None]).exp()
        for scores in (1, 300, 10**6):
            rows = torch.zeros(1, 6, 14, 23)
            for where, weights, seen in weights_of_rows(call, 5, 19, BlockPlan(scores=scores)):
                rows[:, :, where.start - 5 : where.stop - 5] = weights
                assert torch.equal(seen, visible[:, :, where])
            torch.testing.assert_close(rows, wanted[:, :, 5:19].float(), rtol=1e-5, atol=1e-6)
    assert runs([2, 3, 4, 7, 9, 10]) == [(2, 5), (7, 8), (9, 11)]
    assert runs([]) == []


def test_nearest_tokens_over_chunks_with_rows_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2 * CHUNK + 77, 6, generator=generator)
    gone = torch.rand(len(matrix), generator=generator) < 0.3
    states = torch.randn(5, 6, generator=generator)
    cosine, ids = nearest_tokens(states, Vocabulary(matrix, gone, (0, 0, 0, 0)), 3)
    every = torch.nn.functional.cosine_similarity(states[:, None], matrix[None], dim=-1).masked_fill(gone, -9)
    torch.testing.assert_close(cosine, every.topk(3).values, rtol=0, atol=1e-5)
    assert not gone[ids].any()
    few, none = nearest_tokens(states, Vocabulary(matrix[:2], torch.tensor([True, False]), (0, 0, 0, 0)), 3)
    assert none.tolist() == [[1, -1, -1]] * 5
    assert torch.isnan(few[:, 1:]).all()


def test_rows_that_were_never_trained_are_found() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.randn(900, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
        matrix[[4, 71, 899]] = matrix[3].clone()
        matrix[100] = 0
        matrix[200] = matrix[201].flip(0)
        assert repeated_rows(matrix).nonzero()[:, 0].tolist() == [3, 4, 71, 100, 899]


def test_the_vocabulary_says_why_rows_are_left_out() -> None:
    model = opened_vlm("llava")
    module: Any = model.module
    embedding = module.get_input_embeddings().weight
    with torch.no_grad():
        embedding[[50, 60]] = embedding[49].clone()

    class Tokenizer:
        pad_token_id, bos_token_id = PAD, 1

        def __len__(self) -> int:
            return 305

    words = vocabulary(type(model)(model.module, Tokenizer(), model.anatomy, model.info))
    assert words is not None
    assert words.counts == (1, 1, 320 - 305 - 1, 3)
    assert words.excluded.nonzero()[:, 0].tolist() == [PAD, 49, 50, 60, *range(305, 320)]
    again = vocabulary(model)
    assert again is words  # looked at once
    with torch.no_grad():
        embedding[70] = embedding[71].clone()
    changed = vocabulary(model)
    assert changed is not None
    assert changed is not words
    assert bool(changed.excluded[70])


def test_query_entropy_by_hand() -> None:
    """Two heads whose centred queries are opposite: one eigenvalue, entropy 0 when normalised."""
    queries = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[2.0, 1.0], [2.0, 1.0]]])
    assert query_entropy(queries, normalised=True)[0] == pytest.approx(0.0, abs=1e-6)
    assert query_entropy(queries)[0] == pytest.approx(0.0, abs=1e-6)  # one eigenvalue of 1
    assert query_entropy(queries, normalised=True)[1] == pytest.approx(1.0)  # nothing but the clamp, twice
    assert math.isnan(float(query_entropy(queries[:, :1])[0]))
