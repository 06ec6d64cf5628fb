"""The mass ledger equals sums over whole maps, without and with mitigations, and its groups add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.analyzers import MassLedger
from sinklens.analyzers.key_groups import GROUPS, Grouped, learned, masses
from sinklens.inputs.spans import Kind
from sinklens.inputs.spec import Prompt
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.pipeline.mass_ledger import ledger_of, ledger_sentence, side_by_side, with_ledger
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.executor import TracePlan, trace
from tests.families import FAMILIES, LAYERS, build
from tests.mitigations.definitions import METHODS, definition
from tests.mitigations.dense import rewritten
from tests.pictures import opened_vlm, picture_prompt

TEXTS = ("llama", "mistral", "gpt_oss", "gemma2", "deepseek_v3")
PICTURES = ("llava", "qwen2_5_vl", "gemma3")
PLAN = TracePlan(signals=MassLedger.needs)


def opened_text(family: str) -> OpenedModel:
    model = build(family)
    config = model.config
    info = ModelInfo(
        family, None, family, LAYERS, config.num_attention_heads, config.num_attention_heads, config.hidden_size, 0,
        "float32", vocab_size=config.vocab_size,
    )  # fmt: skip
    return OpenedModel(model, None, find_anatomy(model), info)


def text_prompts() -> list[Prompt]:
    rng = np.random.default_rng(3)
    ids = [tuple(map(int, rng.integers(5, 300, length))) for length in (19, 31, 26)]
    return [Prompt(i, row, tuple(map(str, row)), f"made:{i}", "") for i, row in enumerate(ids)]


def maps(opened: OpenedModel, prompt: Prompt, mitigation: Any = None) -> list[Tensor]:
    """Whole maps `[head, query, key]` of every layer, rewritten by the mitigation's formula."""
    batch = collate([prompt])
    real = batch.valid if batch.valid is not None else torch.ones(1, len(prompt), dtype=torch.bool)
    rewrite = definition(mitigation, real) if mitigation is not None else None
    found: dict[int, Tensor] = {}

    def seen(site: Any, weights: Tensor) -> Tensor:
        new = weights if rewrite is None else rewrite(site, weights.clone())
        found[site.layer] = new[0]
        return new

    with torch.no_grad(), rewritten(opened.module, seen, real):
        forward(opened.module, batch)
    return [found[layer] for layer in sorted(found)]


def any_groups(prompts: list[Prompt], seed: int = 0) -> Grouped:
    """Tokens in groups at random, other ones in every layer: sums know nothing of how sinks are told."""
    rng, members = np.random.default_rng(seed), {}
    for prompt in prompts:
        visual = np.zeros(len(prompt), dtype=bool) if prompt.visual is None else prompt.visual.spans.visual
        sink = rng.random((LAYERS, len(prompt))) < 0.3
        members[prompt.index] = np.where(visual, np.where(sink, 1, 2), np.where(sink, 0, 3)).astype(np.int8)
    pictured = prompts[0].visual is not None
    return Grouped(members, "states", "the text" if pictured else "all tokens", pictured)


def dense(opened: OpenedModel, prompts: list[Prompt], groups: Grouped, mitigation: Any = None) -> np.ndarray:
    """`[prompt, layer, group]` by the plainest sums."""
    found = []
    for prompt in prompts:
        rows = np.arange(len(prompt))
        if prompt.visual is not None:
            rows = np.flatnonzero(prompt.visual.spans.is_(Kind.QUESTION, Kind.GENERATED))
        layers = []
        for layer, weights in enumerate(maps(opened, prompt, mitigation)):
            mine = weights[:, rows].mean((0, 1)).numpy()
            layers.append([mine[groups.members[prompt.index][layer] == g].sum() for g in range(len(GROUPS))])
        found.append(layers)
    return np.array(found)


@pytest.mark.parametrize("method", [None, "zero-tuning", "knock-out", "act", "scaling-unnormalised"])
@pytest.mark.parametrize("family", TEXTS)
def test_masses_of_texts_are_sums_over_the_map(family: str, method: str | None) -> None:
    opened, prompts = opened_text(family), text_prompts()
    check(opened, prompts, METHODS[method] if method else None, FAMILIES[family].learned_sinks)


@pytest.mark.parametrize("method", [None, "zero-tuning"])
@pytest.mark.parametrize("family", PICTURES)
def test_masses_of_pictures_are_sums_over_the_text_rows(family: str, method: str | None) -> None:
    opened, prompts = opened_vlm(family), [picture_prompt(family, seed=i, index=i) for i in range(2)]
    check(opened, prompts, METHODS[method] if method else None, False)


def check(opened: OpenedModel, prompts: list[Prompt], mitigation: Any, sinks: bool) -> None:
    groups = any_groups(prompts)
    if mitigation is None:
        traced = trace(opened, prompts, PLAN)
    else:
        with mitigation(opened) as effect:
            traced = trace(opened, prompts, PLAN)
        assert effect.acted
    mass = masses(traced, groups)
    expected = dense(opened, prompts, groups, mitigation)
    np.testing.assert_allclose(mass, expected, rtol=0, atol=3e-6)
    assert mass.shape == (len(prompts), LAYERS, len(GROUPS))
    rest = learned(traced, groups)
    assert (rest is not None) == sinks
    whole = mass.sum(-1) + (0.0 if rest is None else rest)
    if getattr(mitigation, "renormalise", True):
        np.testing.assert_allclose(whole, 1.0, rtol=0, atol=3e-6)
    else:
        assert np.abs(whole - 1.0).max() > 0.01, "a method that does not renormalise shows"
    if rest is not None and mitigation is None:
        assert 0.01 < rest.min() < rest.max() < 0.99


def test_side_by_side_holds_the_groups_of_the_unchanged_model() -> None:
    """Knock-out leaves the model without its sink, and its ledger still says where the sink's attention went."""
    import sinklens as sl

    run = sl.mitigate(
        "bundled:dense-ind",
        "knock-out",
        tasks="induction",
        n=4,
        n_items=8,
        analyzers=("primary-sinks",),
        dtype="float32",
    )
    entry = run.entries[0]
    assert run.after["knock-out"].findings["primary-sinks"].status == "not-found"
    ledger = entry["ledger"]
    before = run.findings["mass-ledger"].summary
    assert ledger["rule"] == "attention"
    assert ledger["total"]["text_sink"]["unchanged"] == pytest.approx(before["text_sink"])
    assert 0.3 < before["text_sink"] < 0.6
    assert ledger["total"]["text_sink"]["mitigated"] < 0.03  # the first token still sees itself alone
    assert set(ledger["total"]) == {"text_sink", "other"}
    for row in [ledger["total"], *ledger["layers"]]:
        shares = [row[key] for key in ("text_sink", "other")]
        assert sum(share["change"] for share in shares) == pytest.approx(0.0, abs=1e-6)
        assert sum(share["mitigated"] for share in shares) == pytest.approx(1.0, abs=1e-6)
        assert all(s["change"] == pytest.approx(s["mitigated"] - s["unchanged"]) for s in shares)
    assert [row["layer"] for row in ledger["layers"]] == list(range(4))
    frame = run.ledger.to_frame()
    assert len(frame) == 2 * (1 + 4)
    assert set(frame["group"]) == {"text sink", "other"}
    assert "-> " in ledger_sentence(ledger)
    assert list(ledger_of(run.entries)) == list(run.ledger)
    page = run._repr_html_()
    assert "knock-out" in page
    keys = [figure.key for figure in run.figures["mitigations"]]
    assert "ledger-knock-out" in keys


def test_it_is_always_there_and_says_why_it_can_be_none() -> None:
    assert with_ledger(("primary-sinks",)) == ("primary-sinks", "mass-ledger")
    assert with_ledger(("mass-ledger:rule=attention",)) == ("mass-ledger:rule=attention",)
    assert with_ledger(("all",)) == ("all",)
    opened = opened_text("llama")
    short = [Prompt(0, (5, 6, 7), ("a", "b", "c"), "made:0", "")]
    traced = trace(opened, short, PLAN)
    found = side_by_side(traced, traced, ())
    assert "at least 32 tokens" in found["reason"]
    assert ledger_sentence(found).startswith("none: sink rates need prompts")
    assert not ledger_of([{"label": "x", "ledger": found}, {"label": "y", "ledger": None}])
