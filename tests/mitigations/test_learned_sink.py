"""A sink logit beside all keys equals the softmax with one more logit, and its mass is what a trace calls learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.kernels.reference import dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, Stat, Want
from sinklens.mitigations import LearnedSink, NothingEdited, ZeroTuning
from sinklens.tracers.attention import Site

from ..families import build, inputs
from .dense import rewritten
from .test_methods import assert_close, stepwise
from .test_stack import watched
from .test_with import logits, state


def with_sink(call: AttentionCall, sink: float) -> Tensor:
    """The whole map under a softmax with one more logit, besides those the model has."""
    sizes = sizes_of(call, Want(frozenset()))
    visible = dense_visibility(call, sizes)
    z = dense_logits(call, sizes, visible)
    more = [torch.full_like(z[..., :1], sink)]
    if call.learned_sinks is not None:
        more.append(call.learned_sinks.double()[None, :, None, None].expand(*z.shape[:3], 1))
    weights = torch.softmax(torch.cat([z, *more], -1), -1)[..., : sizes.keys]
    return torch.where(visible.any(-1, keepdim=True), weights, 0.0)


@pytest.mark.parametrize("sink", [0.0, 2.5])
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "deepseek_v3", "gemma3_text", "gpt_oss", "gemma2", "llava"]
)
def test_it_is_a_softmax_with_one_more_logit(family: str, sink: float) -> None:
    model, given = build(family), inputs(family, batch=2, length=17, padding="left")
    real, calls = given["attention_mask"] != 0, []

    def check(site: Site, call: AttentionCall, found: Any) -> None:
        truth = with_sink(replace(call, edits=()), sink)
        rows = real[:, None].expand(truth.shape[:3])
        off = found[Stat.LEARNED_SINK].double()
        torch.testing.assert_close(off[rows], 1.0 - truth.sum(-1)[rows], rtol=0, atol=2e-6)
        received = torch.where(rows[..., None], truth, 0.0).sum(2)
        torch.testing.assert_close(found[Stat.RECEIVED].double(), received, rtol=0, atol=2e-5)
        calls.append(site.layer)

    def rewrite(site: Site, weights: Tensor) -> Tensor:
        """exp(z) / (e^s + sum exp z) is A / (1 + e^(s - lse)), with the lse of the layer's own call."""
        left = 1.0 - torch.sigmoid(sink - norms[site.layer])
        return weights * left[..., None]

    norms: dict[int, Tensor] = {}

    def norm(site: Site, call: AttentionCall, found: Any) -> None:
        norms[site.layer] = found[Stat.LSE].double()

    with LearnedSink(logit=sink)(model) as effect:
        found = logits(model, given)
        with watched(model, real, check):
            assert torch.equal(logits(model, given), found)
        with watched(model, real, norm):
            logits(model, given)
    with rewritten(model, rewrite, real):
        expected = logits(model, given)
    assert len(calls) == len(norms) > 0
    assert_close(found.double(), expected.double(), real)
    assert effect.rows_edited == effect.rows_seen > 0


def test_a_decoded_row_is_the_last_row_of_a_fresh_pass() -> None:
    model, given = build("mistral"), inputs("mistral", batch=2, length=21, padding="left")
    with LearnedSink()(model):
        expected = logits(model, {**given, "use_cache": False})  # type: ignore[dict-item]
        found = stepwise(model, given, prompt=9)
    limit = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected[:, 9:].double(), rtol=0, atol=limit)


def test_a_sink_far_below_changes_nothing_and_company_is_refused() -> None:
    model, given = build("llama"), inputs("llama")
    before, plain = state(model), logits(model, given)
    with pytest.warns(NothingEdited, match="learned-sink did not act"), LearnedSink(logit=-200.0)(model):
        assert torch.equal(logits(model, given), plain)
    refused = pytest.raises(UsageError, match="can be put on last")
    with pytest.warns(NothingEdited), LearnedSink()(model), refused, ZeroTuning()(model):
        pass
    with pytest.raises(UsageError, match="put on before"), ZeroTuning()(model), LearnedSink()(model):
        logits(model, given)
    assert state(model) == before
