"""Every method equals its definition on whole maps, on every class of models, padded, with and without a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sinklens.kernels.spec import AttentionCall
from sinklens.kernels.transfer import transfer
from sinklens.mitigations import ACT, Mitigation, ZeroTuning
from sinklens.mitigations.base import Seen
from sinklens.mitigations.tokens import Tokens
from sinklens.tracers.attention import Site

from ..families import FAMILIES, LAYERS, build, inputs
from .definitions import CLASSES, METHODS, definition
from .dense import act_map, act_sinks, full_map, mixed, rewritten, scaled_map


def logits(model: Any, given: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**given, **more).logits.double()


def assert_close(found: Tensor, expected: Tensor, real: Tensor) -> None:
    """To float32 rounding through a few layers, where there are real tokens."""
    limit = 2e-5 * float(expected[real].abs().max())
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=limit)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CLASSES)
def test_a_method_equals_its_definition(family: str, method: str) -> None:
    model, mitigation = build(family), METHODS[method]
    given = inputs(family, batch=3, length=17, padding="left")
    real = given["attention_mask"] != 0
    with rewritten(model, definition(mitigation, real, FAMILIES[family].causal), real):
        expected = logits(model, given)
    plain = logits(model, given)
    with mitigation(model) as effect:
        found = logits(model, given)
    assert_close(found, expected, real)
    assert effect.acted
    assert not torch.allclose(found[real], plain[real], rtol=0, atol=1e-3)
    assert torch.equal(logits(model, given), plain)


@pytest.mark.parametrize("method", METHODS)
def test_right_padding_and_eager_attention(method: str) -> None:
    model, mitigation = build("llama"), METHODS[method]
    model.set_attn_implementation("eager")
    given = inputs("llama", batch=3, length=17, padding="right")
    real = given["attention_mask"] != 0
    with rewritten(model, definition(mitigation, real), real):
        expected = logits(model, given)
    with mitigation(model):
        found = logits(model, given)
    assert_close(found, expected, real)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    """No further from the definition than the unedited model in half precision is from the one in float32."""
    mitigation, given = METHODS[method], inputs("llama", batch=2, length=17, padding="left")
    real = given["attention_mask"] != 0
    exact, half = build("llama"), build("llama", dtype=dtype)
    rounding = (logits(half, given) - logits(exact, given))[real].abs().max()
    with rewritten(half, definition(mitigation, real), real):
        expected = logits(half, given)
    with mitigation(half):
        found = logits(half, given)
    assert float((found - expected)[real].abs().max()) <= 2 * float(rounding)


@pytest.mark.parametrize("method", ["zero-tuning", "knock-out", "scaling", "scaling-unnormalised"])
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "deepseek_v3", "mistral", "gemma2", "gemma3_text", "gpt_oss"]
)
def test_a_decoded_row_is_the_last_row_of_a_fresh_pass(family: str, method: str) -> None:
    """Left padding, a cache, windows that lose the first tokens: step by step as all at once."""
    model, mitigation = build(family), METHODS[method]
    given = inputs(family, batch=2, length=21, padding="left")
    with mitigation(model) as fresh:
        expected = logits(model, given, use_cache=False)
    with mitigation(model) as effect:
        found = stepwise(model, given, prompt=9)
    torch.testing.assert_close(found, expected[:, 9:], rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert effect.rows_edited == fresh.rows_edited
    assert effect.mean_mass_moved == pytest.approx(fresh.mean_mass_moved, rel=1e-4)


def stepwise(model: Any, given: dict[str, Tensor], prompt: int) -> Tensor:
    """Logits of the tokens after the prompt, two at once first, then one by one."""
    cache, parts, start = None, [], 0
    ids, mask = given["input_ids"], given["attention_mask"]
    for end in (prompt, prompt + 2, *range(prompt + 3, ids.shape[1] + 1)):
        with torch.no_grad():
            out = model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True
            )
        cache, start = out.past_key_values, end
        parts.append(out.logits.double())
    return torch.cat(parts[1:], 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_act_keeps_the_prompts_sinks_while_it_generates(family: str) -> None:
    """The sinks of the first 12 tokens, in every later row too, also after a window has dropped some of them."""
    model, mitigation, prompt = build(family), ACT(alpha=2.0, beta=0.1, layers=range(LAYERS)), 12
    given = inputs(family, batch=2, length=21, padding="left")
    real = given["attention_mask"] != 0

    def rewrite(site: Site, weights: Tensor) -> Tensor:
        early = weights[:, :, :prompt, :prompt]
        sinks = act_sinks(early, real[:, :prompt], mitigation.alpha)
        return act_map(weights, F.pad(sinks, (0, weights.shape[-1] - prompt)), mitigation.beta)

    with rewritten(model, rewrite, real):
        expected = logits(model, given, use_cache=False)[:, prompt:]
    with mitigation(model) as effect:
        found = stepwise(model, given, prompt=prompt)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert effect.acted


def test_four_ways_to_tune_the_first_token() -> None:
    """A logit shift, an extra channel of q and k, the map itself and the transfer, with a gamma per query head."""
    torch.manual_seed(0)
    heads, kv_heads, length, dim = 6, 2, 13, 7
    gamma = torch.tensor([0.2, 0.7, 1.0, 1.5, 3.0, 8.0])
    query, key = torch.randn(2, heads, length, dim), torch.randn(2, kv_heads, length, dim)
    value, scale = torch.randn(2, kv_heads, length, 5), dim**-0.5
    causal = torch.ones(length, length).tril() > 0
    wide_key, wide_value = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1)

    bias = torch.zeros(1, heads, length, length)
    bias[..., 0] = gamma.log()[:, None]
    shifted = F.scaled_dot_product_attention(
        query, wide_key, wide_value, attn_mask=bias.masked_fill(~causal, -math.inf), scale=scale
    )
    channel = (gamma.log() / scale)[None, :, None, None].expand(2, -1, length, 1)
    mark = torch.zeros(2, heads, length, 1)
    mark[:, :, 0] = 1.0
    extra = F.scaled_dot_product_attention(
        torch.cat([query, channel], -1),
        torch.cat([wide_key, mark], -1),
        wide_value,
        is_causal=True,
        scale=scale,
    )
    call = AttentionCall(query, key, value, scale)
    weights = full_map(call)
    post = mixed(scaled_map(weights, torch.zeros(2, 1, dtype=torch.long), gamma), call)
    found = tuned(call, ZeroTuning(gammas=[(0, head, float(gamma[head])) for head in range(heads)]))
    torch.testing.assert_close(found, shifted.transpose(1, 2), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, extra.transpose(1, 2), rtol=0, atol=2e-6)
    torch.testing.assert_close(found.double(), post, rtol=0, atol=1e-6)
    plain = F.scaled_dot_product_attention(query, wide_key, wide_value, is_causal=True, scale=scale)
    assert torch.equal(found[:, :, 2], plain.transpose(1, 2)[:, :, 2])
    assert torch.equal(found[:, 0], plain.transpose(1, 2)[:, 0])


def tuned(call: AttentionCall, mitigation: Mitigation) -> Tensor:
    """A mitigation on one call of layer 0, without a model."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.repeat_interleave(group, 1), call.value.repeat_interleave(group, 1)
    output = F.scaled_dot_product_attention(call.query, key, value, is_causal=True, scale=call.scale)
    heads = torch.ones(call.query.shape[1], dtype=torch.bool)
    seen = Seen(Site("text", 0), call, None, Tokens(passes=1, inputs=1), heads, True, {})
    sets = mitigation.sets(seen)
    assert sets is not None
    rows = mitigation.rows(seen)
    return transfer(
        call, output.transpose(1, 2), sets, lambda shares: mitigation.factors(seen, shares), rows=rows
    ).output


@pytest.mark.parametrize("beta", [0.0, 0.4, 0.9])
def test_act_closed_form_is_its_matrix_form(beta: float) -> None:
    """`o' = beta o_S + (1 - beta m) / (1 - m) (o - o_S)`, and rows of the matrix still add up to 1."""
    torch.manual_seed(2)
    call = AttentionCall(
        2 * torch.randn(2, 6, 23, 5), torch.randn(2, 3, 23, 5), torch.randn(2, 3, 23, 4), 0.5
    )
    weights = full_map(call)
    sinks = act_sinks(weights, torch.ones(2, 23, dtype=torch.bool), 3.0)
    assert sinks.any()
    matrix = act_map(weights, sinks, beta)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 6, 23, dtype=torch.float64))
    only = weights * sinks[:, :, None]
    mass, part = only.sum(-1).transpose(1, 2)[..., None], mixed(only, call)
    closed = beta * part + (1 - beta * mass) / (1 - mass) * (mixed(weights, call) - part)
    torch.testing.assert_close(mixed(matrix, call), closed, rtol=0, atol=1e-12)
    found = tuned(call, ACT(alpha=3.0, beta=beta))
    torch.testing.assert_close(found.double(), closed, rtol=0, atol=2e-6)


def all_on(key: int, strength: float) -> AttentionCall:
    """Rows that give nearly everything to one key (the first row sees itself only)."""
    torch.manual_seed(6)
    query, keys = torch.randn(1, 2, 19, 6), torch.randn(1, 1, 19, 6)
    query[..., 0], keys[..., 0] = 1.0, 0.0
    keys[:, :, key, 0] = strength
    return AttentionCall(query, keys, torch.randn(1, 1, 19, 3), 1.0)


def test_act_leaves_rows_alone_that_have_nothing_elsewhere() -> None:
    """Mass 1 on a sink: nowhere to move it to, and no division by zero."""
    call = all_on(2, 40.0)
    weights = full_map(call)
    assert float(1 - weights[0, :, 5:, 2].min()) < 1e-6
    plain = tuned(call, ACT(beta=1.0))
    found = tuned(call, ACT(beta=0.4))
    assert torch.equal(found, plain)


@pytest.mark.parametrize("gamma", [1e-6, 1e6])
@pytest.mark.parametrize("strength", [2.0, 12.0])
def test_extreme_gammas_stay_exact(gamma: float, strength: float) -> None:
    call = all_on(0, strength)
    expected = mixed(scaled_map(full_map(call), torch.zeros(1, 1, dtype=torch.long), gamma), call)
    found = tuned(call, ZeroTuning(gamma=gamma))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


def test_act_is_not_a_constant_shift_of_logits() -> None:
    """ZeroTuning with gamma = beta on the same tokens is another method."""
    torch.manual_seed(3)
    call = AttentionCall(
        2 * torch.randn(1, 2, 23, 5), torch.randn(1, 1, 23, 5), torch.randn(1, 1, 23, 4), 0.5
    )
    weights = full_map(call)
    sinks = act_sinks(weights, torch.ones(1, 23, dtype=torch.bool), 2.0)
    at = sinks[0, 0].nonzero()[:, 0][None]
    assert at.numel()
    shifted = scaled_map(weights, at, 0.4)[:, 0]
    assert (shifted - act_map(weights, sinks, 0.4)[:, 0]).abs().max() > 1e-3


def test_act_recipe_code_spares_the_first_token_it_finds() -> None:
    """Where the first token is no sink, the program of the authors spares a true one; the paper's rule does not."""
    torch.manual_seed(4)
    key = torch.randn(1, 1, 40, 6) * 0.1
    query = torch.randn(1, 1, 40, 6) * 0.1
    query[..., 0] = 6.0
    key[:, :, 3, 0] = 3.0
    key[:, :, 7, 0] = 2.6
    call = AttentionCall(query, key, torch.randn(1, 1, 40, 6), 0.5)
    heads, seen_by = torch.ones(1, dtype=torch.bool), 16

    def sinks(mitigation: ACT) -> list[int]:
        seen = Seen(Site("text", 0), call, None, Tokens(passes=1, inputs=1), heads, True, {})
        return mitigation.sinks(seen)[0, 0].nonzero()[:, 0].tolist()

    assert sinks(ACT(min_visible=seen_by)) == [3, 7]
    assert sinks(ACT(recipe="code", min_visible=seen_by)) == [7]
    received = full_map(call)[0, 0].sum(0) / torch.arange(40, 0, -1)
    between = float(received[3] + received[7]) / 2
    assert sinks(ACT(threshold=between, min_visible=seen_by)) == [3]
