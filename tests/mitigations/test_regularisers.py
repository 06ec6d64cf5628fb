"""Regularisers against their dense definitions, and their gradients against differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.kernels.spec import AttentionCall
from sinklens.mitigations import regularisers
from sinklens.mitigations.regularisers import (
    Decorrelation,
    MassivePenalty,
    Regularised,
    SinkMass,
    column_mass,
)

from ..families import FAMILIES, build, inputs
from .test_with import state

REAL = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()


def states(layers: int = 4, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(3, 5, 7, generator=rng, dtype=dtype) for _ in range(layers + 1)]


def test_decorrelation_is_its_definition_on_the_exact_index_set() -> None:
    given = states()
    total = []
    for h in given[1:-1]:
        for row in range(2):  # the third prompt has one token
            places = REAL[row].nonzero()[:, 0].tolist()
            first = h[row, places[0]]
            values = [float(first @ h[row, t] / first.norm() / h[row, t].norm()) ** 2 for t in places[1:]]
            total.append(sum(values) / len(values))
    assert float(Decorrelation()(given, REAL)) == pytest.approx(sum(total) / len(total), abs=1e-12)
    other = [given[0] * 2 + 1, *given[1:-1], given[-1] - 3]
    assert torch.equal(Decorrelation()(other, REAL), Decorrelation()(given, REAL))
    padded = [torch.where(REAL[..., None], s, 1e3) for s in given]
    assert torch.equal(Decorrelation()(padded, REAL), Decorrelation()(given, REAL))
    tokens = torch.tensor([[0, 0, 0, 1, 0]] * 3).bool()
    one = [
        float(torch.cosine_similarity(s[row, first], s[row, 3], dim=0)) ** 2
        for s in given[1:-1] for row, first in ((0, 2), (1, 0))
    ]  # fmt: skip
    assert float(Decorrelation()(given, REAL, tokens)) == pytest.approx(sum(one) / len(one), abs=1e-12)
    same = [torch.ones(2, 3, 4)] * 3
    assert float(Decorrelation()(same)) == pytest.approx(1)
    assert float(Decorrelation()([-s if i else s for i, s in enumerate(same)])) == pytest.approx(1)


def test_the_massive_penalty_is_its_definition_and_does_not_pay_for_a_larger_median() -> None:
    given = states()
    given[2][1, 3, 4], given[1][0, 2, 6], given[1][0, 0, 0] = -90.0, 50.0, 1e6  # the last one is padding
    total = []
    for h in given[1:-1]:
        for row in range(3):
            mine = h[row][REAL[row]].abs()
            over = (mine / (5 * mine.flatten().median())).log().clamp_min(0).square()
            total.append(float(over.sum() / len(mine)))
    assert float(MassivePenalty(5)(given, REAL)) == pytest.approx(sum(total) / len(total), abs=1e-12)
    assert sum(total) > 1
    assert float(MassivePenalty(1e9)(given, REAL)) == 0
    leaf = given[1].clone().requires_grad_()
    MassivePenalty(5)([given[0], leaf, given[2]]).backward()
    assert leaf.grad is not None
    limit = 5 * leaf.detach().abs().flatten(1).median(1).values[:, None, None]
    assert torch.equal(leaf.grad != 0, leaf.detach().abs() > limit)


def attention(call: AttentionCall) -> Tensor:
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    logits = call.query @ key.mT * call.scale
    if call.softcap:
        logits = call.softcap * (logits / call.softcap).tanh()
    visible = torch.ones(logits.shape[-2:], dtype=torch.bool).tril() if call.mask is None else call.mask
    logits = logits.masked_fill(~visible, -torch.inf)
    if call.learned_sinks is not None:
        logits = torch.cat([logits, call.learned_sinks[:, None, None].expand(*logits.shape[:3], 1)], -1)
    return logits.softmax(-1).nan_to_num()[..., : key.shape[2]]


def a_call(**fields: Any) -> AttentionCall:
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(3, 4, 5, 3, generator=rng, dtype=torch.float64)
    k = torch.randn(3, 2, 5, 3, generator=rng, dtype=torch.float64)
    return AttentionCall(q.requires_grad_(), k.requires_grad_(), k, 1.3, **fields)


WINDOW = REAL[:, None, None] & torch.ones(5, 5).bool().tril() & torch.ones(5, 5).bool().triu(-2)
CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padded": {"mask": REAL[:, None, None] & torch.ones(5, 5).bool().tril()},
    "window, soft-cap, learned sinks": {
        "mask": WINDOW, "softcap": 2.0, "learned_sinks": torch.tensor([0.3, -1, 2, 0], dtype=torch.float64),
    },
}  # fmt: skip


@pytest.mark.parametrize("rows", [2, 128])
@pytest.mark.parametrize("name", CALLS)
def test_sink_mass_is_a_column_of_the_map(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularisers, "ROWS", rows)
    call, real = a_call(**CALLS[name]), REAL if CALLS[name] else torch.ones_like(REAL)
    first = real.int().argmax(1)
    dense = attention(call)
    mine = column_mass(call, first)
    for row in range(3):
        places = real[row].nonzero()[:, 0]
        torch.testing.assert_close(
            mine[row][:, places], dense[row][:, places, first[row]], rtol=0, atol=1e-12
        )
    rows_of = [dense[b][:, real[b].nonzero()[1:, 0], first[b]] for b in range(3) if real[b].sum() > 1]
    for allowed in (0.0, 0.3):
        wanted = torch.stack([(r - allowed).clamp_min(0).mean() for r in rows_of]).mean()
        torch.testing.assert_close(SinkMass(allowed).of_call(call, real), wanted, rtol=0, atol=1e-12)
    got = torch.autograd.grad(SinkMass().of_call(call, real), [call.query, call.key])
    wanted = torch.autograd.grad(torch.stack([r.mean() for r in rows_of]).mean(), [call.query, call.key])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    if name == "padded":
        plain = SinkMass()(call.query, call.key, real, scale=1.3)
        torch.testing.assert_close(plain, SinkMass().of_call(call, real), rtol=0, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    given = [s.requires_grad_() for s in states()]
    assert torch.autograd.gradcheck(lambda *s: Decorrelation()(s, REAL), given)
    with torch.no_grad():
        given[1][1, 2, 3], given[2][0, 3, 1] = 40.0, -70.0
    median = torch.full((3, 3), 0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *s: MassivePenalty(9)(s, REAL, median), given)
    for fields in CALLS.values():
        call = a_call(**fields)

        def loss(q: Tensor, k: Tensor, fields: dict[str, Any] = fields) -> Tensor:
            return SinkMass(0.05).of_call(AttentionCall(q, k, k, 1.3, **fields), REAL if fields else None)

        assert torch.autograd.gradcheck(loss, (call.query, call.key))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_model_trains_with_all_terms_and_is_left_as_it_was(family: str) -> None:
    model = build(family)
    given = inputs(family, padding="left" if FAMILIES[family].padding else None)
    labels = given["input_ids"].clone()
    with torch.no_grad():
        model(**given, output_hidden_states=True)  # for which transformers puts hooks of its own, for good
    before = state(model)
    model.train()
    terms = {SinkMass(): 0.5, Decorrelation(): 2.0, MassivePenalty(1.5): 0.25}
    trained = Regularised(model, terms)
    output = trained(**given, labels=labels, use_cache=False)
    assert set(trained.penalties) == {"SinkMass", "Decorrelation", "MassivePenalty"}
    assert trained.task_loss is not None
    wanted = trained.task_loss + sum(
        factor * trained.penalties[type(term).__name__] for term, factor in terms.items()
    )
    torch.testing.assert_close(output.loss.detach(), wanted.detach())
    output.loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.eval()
    assert state(model) == before
    real = given.get("attention_mask", torch.ones_like(labels)).bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    trained.eval()
    with torch.no_grad():
        trained(**given, labels=labels)
    first = real.int().argmax(1)
    per = [
        torch.stack([m[b][:, real[b].nonzero()[1:, 0], first[b]].mean() for b in range(len(real))]).mean()
        for m in maps
    ]
    torch.testing.assert_close(trained.penalties["SinkMass"], torch.stack(per).mean(), rtol=0, atol=1e-5)


def test_tokens_of_the_prompt_are_those_without_labels() -> None:
    model, given = build("llama"), inputs("llama")
    labels = given["input_ids"].clone()
    labels[:, :4] = -100
    with torch.no_grad():
        trained = Regularised(model, {Decorrelation("prompt"): 1.0})
        trained(**given, labels=labels)
        hidden = model(**given, output_hidden_states=True).hidden_states
    wanted = Decorrelation()([h[:, :4] for h in hidden])
    torch.testing.assert_close(trained.penalties["Decorrelation"], wanted)


def test_what_cannot_be_regularised_is_refused() -> None:
    model, given = build("llama"), inputs("llama")
    with pytest.raises(UsageError, match="no labels"):
        Regularised(model, {SinkMass(): 1.0})(**given)
    with pytest.raises(UsageError, match="no terms"):
        Regularised(model, {})
    with pytest.raises(UsageError, match="allowed must be"):
        SinkMass(1.0)
    with pytest.raises(UsageError, match="bound must be"):
        MassivePenalty(0)
    with pytest.raises(UsageError, match="among must be"):
        Decorrelation("some")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least two layers"):
        Decorrelation()(states(1))
    with pytest.raises(DataError, match="No prompt has a token"):
        Decorrelation()([s[:, :1] for s in states()])
    call = a_call()
    with pytest.raises(DataError, match="from a cache"):
        SinkMass().of_call(AttentionCall(call.query[:, :, 1:], call.key, call.key, 1.0))
    model.train()
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="No gradient reaches"):
        Regularised(model, {SinkMass(): 1.0})(**given, labels=given["input_ids"], use_cache=False)
