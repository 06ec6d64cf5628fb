"""Learned sinks per head, key and value biases equal the softmax with one more column, on every class of attention."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sinklens as sl
from sinklens.core.errors import DataError, UsageError
from sinklens.inputs.load import load_prompts
from sinklens.inputs.spec import Prompt
from sinklens.kernels.spec import AttentionCall, Stat
from sinklens.mitigations import (
    KnockOut,
    KVBias,
    LearnedSink,
    Mitigation,
    NothingEdited,
    ValueBias,
    ZeroTuning,
    chosen_methods,
    kv_bias_for,
    learned_sink_for,
)
from sinklens.mitigations.recipes import Recipe, load_recipe, recipe_for
from sinklens.mitigations.sink_values import FAR, MOST, solved
from sinklens.models.anatomy import find_anatomy
from sinklens.models.opening import open_model
from sinklens.testbeds.recipe import recipes
from sinklens.testbeds.train import held_out
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics, sites

from ..families import BOS, FAMILIES, HEADS, LAYERS, build, inputs
from .dense import mixed, places
from .layerwise import held_against, logits_of, softmax_of
from .test_methods import stepwise
from .test_stack import watched
from .test_with import logits, state

CLASSES = ("gpt2", "llama", "deepseek_v3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "bert_mlm", "llava")


def drawn(*shape: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(5)).double()


def widths(family: str) -> tuple[int, int, int]:
    """Heads of keys, width of keys, width of values."""
    model, found = build(family), []
    tap = AttentionTap(
        sites(model, find_anatomy(model).main, "attention"),
        no_statistics,
        ignore,
        edit=lambda _, call, output: found.append(call) or output,
    )
    with tap.attached(model):
        logits(model, inputs(family))
    return found[0].key.shape[1], found[0].key.shape[3], found[0].value.shape[3]


def hidden(z: Tensor, real: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits without the keys at some positions, and which rows are theirs `[batch query]`."""
    z, offset = z.clone(), z.shape[-1] - z.shape[-2]
    own = torch.zeros_like(z[:, 0, :, 0], dtype=torch.bool)
    for position in positions:
        for row, at in enumerate(places(real, position).tolist()):
            z[row, :, :, at] = -torch.inf
            if at >= offset:
                own[row, at - offset] = True
    return z, own


def one_more(
    call: AttentionCall, real: Tensor, place: Tensor, value: Tensor | None, replaces: tuple[int, ...] = ()
) -> Tensor:
    """The definition: a column before all others, with the logits `place`, and a value or none."""
    z, sink = logits_of(call)
    plain = mixed(softmax_of(z, sink), call)
    z, same = hidden(z, real, replaces)
    own = place.expand(*z.shape[:3])[..., None]
    weights = softmax_of(torch.cat([own, z], -1), sink)
    wide = call.value.double().repeat_interleave(z.shape[1] // call.value.shape[1], 1)
    first = (
        torch.zeros_like(wide[:, :, :1]) if value is None else value[None, :, None].expand_as(wide[:, :, :1])
    )
    return torch.where(same[..., None, None], plain, (weights @ torch.cat([first, wide], 2)).transpose(1, 2))


def held(family: str, mitigation: Any, definition: Any, **options: Any) -> Any:
    model, given = build(family), inputs(family, batch=3, length=17, padding="left")
    real = given["attention_mask"] != 0
    with mitigation(model) as effect, held_against(model, real, definition(real)) as apart:
        logits(model, given)
    assert max(apart.values()) > 1e-3
    assert effect.acted
    return effect


SINKS = {
    "one": (2.5, 2.5 + torch.zeros(LAYERS, HEADS).double()),
    "per head": (drawn(HEADS, size=2), drawn(HEADS, size=2).expand(LAYERS, -1)),
    "per layer and head": (drawn(LAYERS, HEADS, size=2), drawn(LAYERS, HEADS, size=2)),
}


@pytest.mark.parametrize("replaces", [(), (0, 3)])
@pytest.mark.parametrize("case", SINKS)
@pytest.mark.parametrize("family", CLASSES)
def test_learned_sinks(family: str, case: str, replaces: tuple[int, ...]) -> None:
    given, table = SINKS[case]

    def definition(real: Tensor) -> Any:
        return lambda site, call: one_more(call, real, table[site.layer][None, :, None], None, replaces)

    effect = held(family, LearnedSink(logit=given, replaces=replaces), definition)  # type: ignore[arg-type]
    assert effect.rows_edited == effect.rows_seen - len(replaces) * 3 * HEADS * LAYERS


@pytest.mark.parametrize("replaces", [(), (0,)])
@pytest.mark.parametrize("case", ["key heads", "query heads", "no value"])
@pytest.mark.parametrize("family", CLASSES)
def test_key_and_value_biases(family: str, case: str, replaces: tuple[int, ...]) -> None:
    kv_heads, width, value_width = widths(family)
    heads = HEADS if case == "query heads" else kv_heads
    key = drawn(LAYERS, heads, width)
    value = None if case == "no value" else drawn(LAYERS, heads, value_width)

    def definition(real: Tensor) -> Any:
        def of_call(site: Site, call: AttentionCall) -> Tensor:
            keys = key[site.layer].repeat_interleave(HEADS // heads, 0)
            place = (call.query.double() * keys[None, :, None]).sum(-1) * call.scale
            if call.softcap is not None:
                place = call.softcap * torch.tanh(place / call.softcap)
            own = None if value is None else value[site.layer].repeat_interleave(HEADS // heads, 0)
            return one_more(call, real, place, own, replaces)

        return of_call

    held(family, KVBias(key=key, value=value, replaces=replaces), definition)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", CLASSES)
def test_value_biases(family: str) -> None:
    kv_heads, _, width = widths(family)
    value = drawn(LAYERS, kv_heads, width)
    value[1] = 0.0

    def definition(real: Tensor) -> Any:
        def of_call(site: Site, call: AttentionCall) -> Tensor:
            own = value[site.layer].repeat_interleave(HEADS // kv_heads, 0)
            return mixed(softmax_of(*logits_of(call)), call) + own

        return of_call

    effect = held(family, ValueBias(value=value), definition)  # type: ignore[arg-type]
    assert effect.rows_edited == effect.rows_seen * 3 // 4
    assert effect.mean_mass_moved == 0.0
    assert "value-bias added to" in effect.require().verdict


def test_a_bias_far_below_is_plain_attention_and_zero_values_are_the_identity() -> None:
    """k' that every query is far from; what no head writes."""
    model, given = build("llama"), inputs("llama", padding="left")
    plain = logits(model, given)
    with pytest.warns(NothingEdited), LearnedSink(logit=[-500.0] * HEADS)(model):
        assert torch.equal(logits(model, given), plain)
    with ValueBias(value=torch.zeros(LAYERS, 2, 16))(model) as effect:  # type: ignore[arg-type]
        assert effect.identity
        assert torch.equal(logits(model, given), plain)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_a_decoded_row_is_the_last_row_of_a_fresh_pass(family: str) -> None:
    model, given = build(family), inputs(family, batch=2, length=21, padding="left")
    kv_heads, width, value_width = widths(family)
    for method in (
        LearnedSink(logit=SINKS["per layer and head"][0], replaces=(0, 3)),  # type: ignore[arg-type]
        KVBias(key=drawn(LAYERS, kv_heads, width), value=drawn(LAYERS, kv_heads, value_width), replaces=(1,)),  # type: ignore[arg-type]
        ValueBias(value=drawn(LAYERS, kv_heads, value_width)),  # type: ignore[arg-type]
    ):
        with method(model) as effect:
            expected = logits(model, {**given, "use_cache": False})  # type: ignore[dict-item]
            once = effect.rows_edited
            found = stepwise(model, given, prompt=9)
        limit = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected[:, 9:].double(), rtol=0, atol=limit)
        assert effect.rows_edited == 2 * once


def text(opened: Any, lengths: tuple[int, ...], first: int = BOS) -> list[Prompt]:
    draw = torch.Generator().manual_seed(2)
    found = []
    for index, length in enumerate(lengths):
        ids = (first, *torch.randint(5, 300, (length - 1,), generator=draw).tolist())
        found.append(Prompt(index, ids, ("x",) * length, "made"))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3_moe", "deepseek_v3", "gemma2", "gpt_oss"])
def test_a_first_token_is_a_key_and_value_bias(family: str) -> None:
    """The token that always comes first has one key and one value: as a bias, and out of sight, nothing changes."""
    opened = open_model(build(family))
    bias = kv_bias_for(opened, text(opened, (9, 13, 6)))
    given = inputs(family, batch=2, length=8)  # windows have not lost the first token yet
    given["input_ids"][:, 0] = BOS
    plain = logits(opened.module, given)
    with bias(opened) as effect:
        found = logits(opened.module, given)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-5 * float(plain.abs().max()))
    assert effect.rows_edited == effect.rows_seen * 7 // 8
    with KVBias(key=bias.key, replaces=(0,))(opened):
        assert not torch.allclose(logits(opened.module, given), plain, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
def test_a_learned_sink_takes_over_the_share_of_a_token(family: str) -> None:
    """Layer by layer, in the states of the model: the mean mass on the sink is what the token had."""
    opened = open_model(build(family))
    prompts = text(opened, (9, 23, 14))
    found = learned_sink_for(opened, prompts)
    logit = torch.tensor(found.logit)
    assert logit.shape == (LAYERS, HEADS)
    shares: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        z, sink = logits_of(call)
        own = torch.ones_like(call.query[:, 0, :, 0]) > 0
        plain = softmax_of(z, sink)[0, :, 1:, 0]
        place = logit[site.layer][None, :, None].expand(*z.shape[:3])[..., None]
        taken = softmax_of(torch.cat([place, hidden(z, own, (0,))[0]], -1), sink)[0, :, 1:, 0]
        shares.setdefault(site.layer, []).append((plain, taken))
        return output

    tap = AttentionTap(
        sites(opened.module, opened.anatomy.main, "attention"), no_statistics, ignore, edit=see
    )
    with tap.attached(opened.module):
        for prompt in prompts:
            logits(opened.module, {"input_ids": torch.tensor([prompt.token_ids])})
    for pairs in shares.values():
        plain, taken = (torch.cat(parts, 1).mean(1) for parts in zip(*pairs, strict=True))
        torch.testing.assert_close(taken, plain, rtol=0, atol=2e-6)
    with found(opened) as effect:
        logits(opened.module, {"input_ids": torch.tensor([prompts[0].token_ids])})
    assert effect.acted


def test_where_a_sink_has_emerged_its_place_matters_more_than_its_value() -> None:
    """The table of docs/mitigations.md: values from some held-out sequences, the loss on others."""
    recipe = recipes["dense-ind"]
    opened, ids = open_model("bundled:dense-ind", dtype="fp32"), held_out(recipe, 128)
    prompts = load_prompts([row.tolist() for row in ids[:64]], None)

    def loss(method: Any) -> float:
        with nullcontext() if method is None else method(opened), torch.no_grad():
            found = opened.module(ids[64:]).logits[:, :-1].double()  # type: ignore[operator]
        return float(torch.nn.functional.cross_entropy(found.transpose(1, 2), ids[64:, 1:]))

    bias = kv_bias_for(opened, prompts)
    found = {
        "plain": loss(None),
        "kv": loss(bias),
        "hidden": loss(KnockOut()),
        "sink": loss(learned_sink_for(opened, prompts)),
        "k": loss(KVBias(key=bias.key, replaces=(0,))),
        "zero": loss(LearnedSink(replaces=(0,))),
    }
    expected = {"plain": 1.0538, "kv": 1.0538, "hidden": 1.1652, "sink": 1.0633, "k": 1.0731, "zero": 1.1065}
    assert found == pytest.approx(expected, abs=1e-3)
    assert found["kv"] == pytest.approx(found["plain"], abs=1e-6)


def test_shares_of_nothing_and_of_everything_have_a_number() -> None:
    rest = drawn(40, 3, size=5)
    found = solved(rest, torch.tensor([0.0, 0.37, 1.0], dtype=torch.float64))
    assert bool(torch.isfinite(found).all())
    taken = torch.sigmoid(found - rest).mean(0)
    assert float(taken[0]) < 1e-15
    assert float(found[0]) == pytest.approx(float(rest[:, 0].min()) - FAR)
    assert float(taken[1]) == pytest.approx(0.37, abs=1e-12)
    assert float(taken[2]) == pytest.approx(MOST, abs=1e-12)
    with pytest.raises(DataError, match="No prompt has a token behind position 7"):
        learned_sink_for(open_model(build("llama")), text(None, (5, 7)), position=7)


def test_a_trace_finds_the_mass_on_what_is_no_key() -> None:
    model, given = build("gpt_oss"), inputs("gpt_oss", batch=2, length=17, padding="left")
    real, table, seen = given["attention_mask"] != 0, SINKS["per head"][1], []

    def check(site: Site, call: AttentionCall, found: Any) -> None:
        z, sink = logits_of(replace(call, edits=()))
        place = table[site.layer][None, :, None].expand(*z.shape[:3])[..., None]
        hiding, same = hidden(z, real, (2,))
        weights = softmax_of(torch.cat([place, hiding], -1), sink)[..., 1:]
        weights = torch.where(same[:, None, :, None], softmax_of(z, sink), weights)
        rows = real[:, None].expand(weights.shape[:3])
        off = found[Stat.LEARNED_SINK].double()
        torch.testing.assert_close(off[rows], 1.0 - weights.sum(-1)[rows], rtol=0, atol=3e-6)
        received = torch.where(rows[..., None], weights, 0.0).sum(2)
        torch.testing.assert_close(found[Stat.RECEIVED].double(), received, rtol=0, atol=2e-5)
        seen.append(site.layer)

    with LearnedSink(logit=SINKS["per head"][0], replaces=(2,))(model), watched(model, real, check):  # type: ignore[arg-type]
        logits(model, given)
    assert seen == list(range(LAYERS))


def test_values_come_from_files_and_stay_in_recipes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    opened = open_model(build("llama"))
    key, value = drawn(LAYERS, 2, 16).float(), drawn(LAYERS, 2, 16, size=0.5).float()
    save_file({"key": key, "value": value}, tmp_path / "bias.safetensors")
    np.savez(tmp_path / "bias.npz", key=key.numpy(), value=value.numpy())
    (tmp_path / "sink.json").write_text(json.dumps({"logit": SINKS["per layer and head"][0].tolist()}))  # type: ignore[union-attr]
    np.save(tmp_path / "value.npy", value.numpy())
    expected = KVBias(key=key.tolist(), value=value.tolist(), replaces=(0,))
    for name in ("bias.safetensors", "bias.npz"):
        file = tmp_path / name
        (found,) = chosen_methods(f"kv-bias:key={file}:value={file}:replaces=0")
        assert found == expected
    (sink, by_head, one) = chosen_methods(
        f"learned-sink:logit={tmp_path / 'sink.json'},learned-sink:logit=0.5+1+-2+0,learned-sink:logit=1:replaces=0+2"
    )
    assert sink == LearnedSink(logit=SINKS["per layer and head"][0])  # type: ignore[arg-type]
    assert by_head == LearnedSink(logit=(0.5, 1, -2, 0))
    assert one == LearnedSink(logit=1.0, replaces=(0, 2))
    assert chosen_methods(f"value-bias:value={tmp_path / 'value.npy'}") == (ValueBias(value=value.tolist()),)
    given = inputs("llama")
    for method in (expected, sink, by_head):
        recipe_for(method, opened).save(tmp_path / "recipe.json")
        again: Recipe = load_recipe(tmp_path / "recipe.json")
        assert again.mitigation == method
        with method(opened):
            edited = logits(opened.module, given)
        with sl.recipe(tmp_path / "recipe.json")(opened):
            assert torch.equal(logits(opened.module, given), edited)
    from sinklens.mitigations.asking import label_of

    assert label_of(expected) == "kv-bias:replaces=0:key=4x2x16 numbers:value=4x2x16 numbers"


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    before = state(model)
    refused: list[tuple[Any, str]] = [
        (LearnedSink(logit=[0.0] * 3), "logit is for 3 heads, and the model has 4"),
        (LearnedSink(logit=[[0.0] * HEADS] * 2), "logit is for 2 layers, and the model has 4"),
        (KVBias(key=torch.zeros(LAYERS, 3, 16)), "key is for 3 heads, and the model has 2 or 4"),  # type: ignore[arg-type]
        (ValueBias(value=torch.ones(5, 2, 16)), "value is for 5 layers"),  # type: ignore[arg-type]
    ]
    for method, told in refused:
        with pytest.raises(UsageError, match=told), method(model):
            pass
    wide = KVBias(key=torch.zeros(LAYERS, 2, 15))  # type: ignore[arg-type]
    with (
        pytest.raises(UsageError, match="key has 15 numbers per head, and layer 0 has 16"),
        wide(model),
    ):
        logits(model, inputs("llama"))
    for make, told in (
        (lambda: LearnedSink(logit=float("nan")), "must hold finite numbers"),
        (lambda: LearnedSink(logit=[[0.0], [0.0, 1.0]]), "rows of equal length"),
        (lambda: LearnedSink(logit=torch.zeros(2, 2, 2)), "3 axes"),  # type: ignore[arg-type]
        (lambda: KVBias(key=[1.0]), "expected 3 axes"),  # type: ignore[arg-type]
        (lambda: LearnedSink(replaces=(-1,)), "positions must be"),
    ):
        with pytest.raises(UsageError, match=told):
            make()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"logits": [0]}')
    for name, told in (("broken", "cannot be read as values of logit"), ("other", "has no 'logit'")):
        with pytest.raises(DataError, match=told):
            chosen_methods(f"learned-sink:logit={tmp_path / name}.json")
    tuning: Mitigation = ZeroTuning()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingEdited)
        with (
            pytest.raises(UsageError, match="put on before"),
            tuning(model),
            KVBias(key=torch.zeros(LAYERS, 2, 16))(model),  # type: ignore[arg-type]
        ):
            logits(model, inputs("llama"))
    assert state(model) == before
    assert FAMILIES["llama"].kind
