"""The streaming cache equals a dense pass in which every query sees what it may see, at positions in the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.evaluation.streaming_cache import streaming_comparison, streaming_losses
from sinklens.models.opening import open_model
from sinklens.models.streaming_cache import streaming_cache

from ..families import VOCAB, build, inputs


def schedule(total: int, chunk: int, start: int, recent: int) -> list[tuple[list[int], int]]:
    """Tokens that each query sees, in the order of the cache."""
    held: list[int] = []
    rows = []
    for at in range(0, total, chunk):
        new = list(range(at, min(at + chunk, total)))
        if len(held) + len(new) > start + recent:
            later = [token for token in held if token >= start]
            held = [token for token in held if token < start] + later[len(later) - (recent - len(new)) :]
        for count, token in enumerate(new):
            rows.append((held + new[: count + 1], token))
        held = held + new
    return rows


def dense(model: Any, ids: Tensor, rows: list[tuple[list[int], int]], original: bool = False) -> Tensor:
    """A Llama written out, one row of attention at a time, in float64."""
    body, config = model.model, model.config
    width, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    speed = theta ** (-torch.arange(0, width, 2).double() / width)

    def turn(x: Tensor, places: Tensor) -> Tensor:
        pair = torch.complex(x[..., : width // 2], x[..., width // 2 :])
        pair = pair * torch.exp(1j * places[:, None] * speed)
        return torch.cat([pair.real, pair.imag], -1)

    h = body.embed_tokens(ids)
    for layer in body.layers:
        x, attention = layer.input_layernorm(h), layer.self_attn
        q, k, v = (
            part(x)[0].unflatten(-1, (-1, width)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        out = []
        for seen, token in rows:
            places = torch.tensor(seen if original else range(len(seen))).double()
            keys = turn(k[:, seen], places).repeat_interleave(group, 0)
            query = turn(q[:, token : token + 1], places[-1:])
            weights = torch.softmax(query @ keys.mT / width**0.5, -1)
            out.append((weights @ v[:, seen].repeat_interleave(group, 0))[:, 0].flatten())
        h = h + attention.o_proj(torch.stack(out)[None])
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    return model.lm_head(body.norm(h))[0]


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize(
    ("start", "recent", "chunk"), [(4, 9, 1), (0, 13, 1), (1, 7, 3), (4, 7, 7), (3, 50, 5)]
)
def test_it_equals_a_dense_pass(start: int, recent: int, chunk: int, original: bool) -> None:
    model = build("llama")
    ids = torch.randint(3, 300, (1, 41), generator=torch.Generator().manual_seed(3))
    found = []
    with torch.no_grad():
        with streaming_cache(model, start=start, recent=recent, original_positions=original) as stream:
            for at in range(0, 41, chunk):
                cached = {"past_key_values": stream.past_key_values}
                found.append(model(ids[:, at : at + chunk], **cached).logits[0])
        truth = dense(build("llama", dtype=torch.float64), ids, schedule(41, chunk, start, recent), original)
    difference = (torch.cat(found).double() - truth).abs().max()
    assert difference <= 1e-5 * truth.abs().max()


def test_generate_is_reading_token_by_token() -> None:
    model = build("llama")
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(4))
    with streaming_cache(model, start=2, recent=7) as stream, torch.no_grad():
        made = model.generate(
            ids, past_key_values=stream.past_key_values, max_new_tokens=20, min_new_tokens=20, do_sample=False
        )
        stream.reset()
        logits = model(ids, past_key_values=stream.past_key_values).logits[:, -1]
        read = []
        for _ in range(20):
            scores = logits.clone()
            scores[:, model.generation_config.eos_token_id or 0] = -torch.inf
            read.append(scores.argmax(-1))
            logits = model(read[-1][:, None], past_key_values=stream.past_key_values).logits[:, -1]
        assert stream.past_key_values.layers[0].keys.shape[2] <= 9
    assert made.shape[1] == 26
    assert torch.equal(made[:, 6:], torch.stack(read, 1))
    assert not model._forward_pre_hooks
    assert not model.model.rotary_emb._forward_pre_hooks


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3_text", "gpt_oss", "bert"])
def test_models_it_cannot_serve_are_refused(family: str) -> None:
    with pytest.raises(ModelError), streaming_cache(build(family)):
        pass


def test_padding_and_long_chunks_are_refused() -> None:
    model, given = build("llama"), inputs("llama", padding="left")
    with streaming_cache(model, start=2, recent=4) as stream:
        with pytest.raises(DataError, match="no padding"):
            model(**given, past_key_values=stream.past_key_values)
        stream.reset()
        with pytest.raises(UsageError, match="without its streaming cache"):
            model(**inputs("llama"))
        ids = torch.arange(10)[None] % VOCAB
        model(ids, past_key_values=stream.past_key_values)
        with pytest.raises(UsageError, match="does not fit"):
            model(ids[:, :5], past_key_values=stream.past_key_values)
    with pytest.raises(UsageError):
        streaming_losses(open_model("bundled:dense-ind"), [1])


def test_a_cache_that_is_never_full_is_the_plain_model() -> None:
    opened = open_model("bundled:dense-ind", dtype="float32")
    ids = [64, *range(10, 40)]
    found = streaming_comparison(opened, ids, start=4, recent=60, chunk=3)
    row = torch.tensor([ids])
    with torch.no_grad():
        plain = float(torch.exp(opened.module(row, labels=row).loss))
    for condition in ("kept", "dropped", "full", "original_positions"):
        assert found[condition]["perplexity"] == pytest.approx(plain, rel=1e-5)
        assert found[condition]["after_full"] is None
