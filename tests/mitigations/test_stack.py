"""Several taps on one model: what a trace sees under mitigations, and mitigations on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.inputs.spec import Prompt
from sinklens.kernels import reference
from sinklens.kernels.reference import dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want
from sinklens.mitigations import ACT, AttentionScaling, KnockOut, Mitigation, NothingEdited, ZeroTuning
from sinklens.models.anatomy import find_anatomy
from sinklens.models.opening import open_model
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import AttentionTap, Mode, Site
from sinklens.tracers.batch import collate
from sinklens.tracers.executor import TracePlan, edited_output, sites, trace
from sinklens.tracers.selfcheck import self_check

from ..families import FAMILIES, LAYERS, build, inputs
from ..kernels.calls import assert_close
from .definitions import CLASSES, METHODS, definition
from .dense import full_map, rewritten
from .test_with import logits, state

ALL = frozenset(Stat)


def wanted(call: AttentionCall) -> Want:
    """Every statistic, of groups that are not the mitigations' own."""
    batch, keys = call.query.shape[0], call.key.shape[2]
    key = torch.arange(keys)
    groups = torch.stack([key == 1, (key % 3 == 0) & (key > 1)])[:, None].expand(-1, batch, -1)
    probes = (torch.arange(call.query.shape[2]) % 4 == 1).expand(batch, -1)
    return Want(ALL, groups=groups, tail=3, window=4, probes=probes, band=(2, 6))


def statistics_of(call: AttentionCall, weights: Tensor, learned: Tensor) -> AttentionStatistics:
    """Every statistic of a whole map, by its definition."""
    sizes, want = sizes_of(call, wanted(call)), wanted(call)
    visible = dense_visibility(call, sizes)
    norm = torch.logsumexp(dense_logits(call, sizes, visible), -1)
    if call.learned_sinks is not None:
        norm = torch.logaddexp(norm, call.learned_sinks.double()[:, None])
    value = call.value.double().repeat_interleave(sizes.group, 1)
    counted = torch.ones_like(visible[:, 0, :, 0]) if call.counted is None else call.counted
    rows = counted & visible.any(-1).any(1)
    live = rows[:, None] & visible.any(-1)
    seen = (visible & rows[:, None, :, None]).sum(2)
    by_head = call.mask is not None and call.mask.ndim == 4 and call.mask.shape[1] > 1
    found = AttentionStatistics(visible=seen if by_head else seen[:, :1], rows=rows)
    for stat in want.stats:
        given = (stat, want, call, weights, norm, value, live, learned)
        found.values[stat] = reference._statistic(*given)
    return found


@contextmanager
def watched(
    model: Any, real: Tensor, check: Callable[..., None], mode: Mode = Mode.FAITHFUL
) -> Iterator[AttentionTap]:
    tower = find_anatomy(model).main
    tap = AttentionTap(sites(model, tower, "attention"), lambda site, call: wanted(call), check, mode=mode)
    tap.counted = real
    with tap.attached(model):
        yield tap


def by_definition(*mitigations: Mitigation, real: Tensor, causal: bool, limit: float) -> Callable[..., None]:
    """Compare what was measured with the map after the mitigations' formulas, one after another."""

    def check(site: Site, call: AttentionCall, found: AttentionStatistics) -> None:
        weights = full_map(replace(call, edits=()))
        learned = 1.0 - weights.sum(-1)
        for mitigation in mitigations:
            weights = definition(mitigation, real, causal)(site, weights)
            # What a learned sink keeps where the row adds up to 1 again.
            conserves = getattr(mitigation, "renormalise", True)
            learned = 1.0 - weights.sum(-1) if conserves else learned
        truth = statistics_of(call, weights, learned)
        assert_close(found, truth, bound=limit)
        check.seen += 1  # type: ignore[attr-defined]

    check.seen = 0  # type: ignore[attr-defined]
    return check


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CLASSES)
def test_what_is_measured_is_the_edited_map(family: str, method: str) -> None:
    """Every statistic, row by row, as from the whole map after the formula; measuring changes no bit."""
    model, mitigation = build(family), METHODS[method]
    given = inputs(family, batch=3, length=17, padding="left")
    real = given["attention_mask"] != 0
    check = by_definition(mitigation, real=real, causal=FAMILIES[family].causal, limit=4e-6)
    with mitigation(model):
        alone = logits(model, given)
        with watched(model, real, check) as tap:
            assert torch.equal(logits(model, given), alone)
        with watched(model, real, check, Mode.FUSED):
            assert torch.equal(logits(model, given), alone)
    assert check.seen == 2 * tap.calls > 0  # type: ignore[attr-defined]


ORDERS = {
    "act, then scaling": (METHODS["act"], METHODS["scaling"]),
    "scaling, then act": (METHODS["scaling"], METHODS["act"]),
    "tuning, then unnormalised": (
        METHODS["zero-tuning"],
        AttentionScaling(factor=0.2, positions=(4,), renormalise=False),
    ),
    "act, then knock-out": (METHODS["act"], KnockOut(positions=(3,))),
    "three": (METHODS["scaling"], KnockOut(positions=(5,)), METHODS["zero-tuning"]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "gemma3_text", "gpt_oss", "gemma2", "qwen2_5_vl"])
def test_mitigations_act_one_after_another(family: str, order: str) -> None:
    """The first that was put on edits first; the output, and what is measured, are those of the formulas in a row."""
    model, stack = build(family), ORDERS[order]
    given = inputs(family, batch=3, length=17, padding="left")
    real = given["attention_mask"] != 0

    def rewrite(site: Site, weights: Tensor) -> Tensor:
        for mitigation in stack:
            weights = definition(mitigation, real)(site, weights)
        return weights

    with rewritten(model, rewrite, real):
        expected = logits(model, given).double()
    check = by_definition(*stack, real=real, causal=True, limit=6e-6)
    with ExitStack() as on:
        effects = [on.enter_context(mitigation(model)) for mitigation in stack]
        found = logits(model, given)
        with watched(model, real, check):
            assert torch.equal(logits(model, given), found)
    scale = float(expected[real].abs().max())
    torch.testing.assert_close(found[real].double(), expected[real], rtol=0, atol=2e-5 * scale)
    assert all(effect.acted for effect in effects)


def test_a_second_edit_is_exact_where_the_first_left_it_almost_nothing() -> None:
    """Its own rest is tiny, so that a difference would be rounding: it is added up from the keys."""
    model, given = build("llama"), inputs("llama", batch=2, length=17, padding="left")
    real = given["attention_mask"] != 0
    up = AttentionScaling(factor=3e4, positions=(1,))
    for second in (
        ACT(alpha=1.5, beta=0.0, layers=range(LAYERS)),
        AttentionScaling(factor=1e-5, positions=(1, 4)),
    ):
        if isinstance(second, AttentionScaling):
            up = KnockOut(positions=(0, 2, 3))
        check = by_definition(up, second, real=real, causal=True, limit=2e-5)
        with up(model), second(model) as effect, watched(model, real, check):
            logits(model, given)
        assert effect.rows_computed_again > 0


def test_a_decoded_row_under_two_mitigations_is_the_last_row_of_a_fresh_pass() -> None:
    from .test_methods import stepwise

    for family in ("llama", "mistral", "gpt_oss"):
        model, given = build(family), inputs(family, batch=2, length=21, padding="left")
        with METHODS["scaling"](model), ZeroTuning(gamma=0.2)(model):
            expected = logits(model, {**given, "use_cache": False})  # type: ignore[dict-item]
            found = stepwise(model, given, prompt=9)
        limit = 2e-5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected[:, 9:].double(), rtol=0, atol=limit)


def test_a_trace_is_of_the_edited_map_in_both_modes_and_says_so() -> None:
    """Signals as the analyzers read them, maps of the first tokens too, and the note in the trace."""
    opened = open_model(build("llama"))
    prompts = [
        Prompt(i, tuple(range(5 + i, 5 + i + length)), ("x",) * length, "made")
        for i, length in enumerate((23, 17))
    ]
    plain = trace(opened, prompts, TracePlan())
    assert "mitigations" not in plain.tracing
    with ZeroTuning(gamma=4.0)(opened):
        found, fused = (trace(opened, prompts, TracePlan(mode=mode)) for mode in Mode)
    assert found.tracing["mitigations"][0]["name"] == "zero-tuning"
    assert found.tracing["mitigations"][0]["parameters"]["gamma"] == 4.0
    assert found.tracing["attention_path"] == (
        "edited: the model's own sdpa kernel, then the mitigations, a blocked sweep of the edited map"
    )
    for record, other in zip(found.records, fused.records, strict=True):
        for name, value in record.arrays.items():
            np.testing.assert_array_equal(value, other.arrays[name], err_msg=name)
    seen: dict[int, Tensor] = {}

    def rewrite(site: Site, weights: Tensor) -> Tensor:
        seen[site.layer] = definition(ZeroTuning(gamma=4.0), torch.ones(1, weights.shape[-1]) > 0)(
            site, weights
        )
        return seen[site.layer]

    from . import definitions

    table = definitions.TABLE.clone()
    definitions.TABLE.fill_(4.0)
    try:
        for record, prompt in zip(found.records, prompts, strict=True):
            batch = collate([prompt])
            with rewritten(opened.module, rewrite, torch.ones(1, len(prompt)) > 0):
                logits(opened.module, batch.inputs)
            maps = torch.stack([seen[layer][0] for layer in range(LAYERS)])
            received = maps.sum(2) / torch.arange(len(prompt), 0, -1)
            kept = record[sig.KEPT_POSITIONS]
            np.testing.assert_allclose(
                record[sig.ATTENTION_RECEIVED], received[:, :, kept], rtol=0, atol=2e-5
            )
            entropy = -torch.xlogy(maps, maps).sum(-1).mean(-1)
            np.testing.assert_allclose(record[sig.ATTENTION_ENTROPY], entropy, rtol=0, atol=5e-5)
            first = maps[:, :, :16, :16].mean(1)
            np.testing.assert_allclose(record[sig.PREFIX_MAP], first, rtol=0, atol=2e-5)
    finally:
        definitions.TABLE.copy_(table)


@pytest.mark.parametrize("method", ["zero-tuning", "knock-out", "act"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_moe"])
def test_the_self_check_passes_under_a_mitigation(family: str, method: str) -> None:
    """Its dense reference knows the edits; replaced outputs still change the logits."""
    opened = open_model(build(family))
    prompts = [
        Prompt(i, tuple(range(5, 5 + length)), ("x",) * length, "made") for i, length in enumerate((23, 17))
    ]
    with METHODS[method](opened):
        checks = self_check(opened, prompts, TracePlan())
        batch = collate(prompts)
        plain = logits(opened.module, batch.inputs)
        changed = edited_output(opened, batch, lambda site, call, output: output * 0.0)
    assert not [check for check in checks if not check.passed]
    assert float((changed.logits - plain).abs().max()) > 1e-3


def test_nothing_stays_after_an_error_in_a_stack() -> None:
    model, given = build("llama"), inputs("llama")
    before = state(model)

    def fails() -> None:
        with (
            METHODS["scaling"](model),
            METHODS["act"](model),
            watched(model, given["attention_mask"] != 0, broken),
        ):
            logits(model, given)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert state(model) == before


def test_leaving_in_any_order_puts_everything_back() -> None:
    """A notebook's cells close what they opened in the order in which they are run."""
    model, given = build("llama"), inputs("llama")
    model.set_attn_implementation("eager")
    before, plain = state(model), logits(model, given)
    one, two = METHODS["scaling"](model), ZeroTuning(gamma=3.0)(model)
    one.__enter__()
    two.__enter__()
    both = logits(model, given)
    one.__exit__(None, None, None)
    left = logits(model, given)
    two.__exit__(None, None, None)
    assert state(model) == before
    assert torch.equal(logits(model, given), plain)
    with ZeroTuning(gamma=3.0)(model):
        assert torch.equal(logits(model, given), left)
    assert not torch.equal(both, left)


def test_combinations_without_a_meaning_are_refused() -> None:
    model = build("llama")
    before = state(model)
    pairs = [
        (
            ZeroTuning(),
            KnockOut(),
            r"takes all attention from token 0, so there is nothing that zero-tuning could",
        ),
        (
            KnockOut(positions=(2, 4)),
            AttentionScaling(factor=2.0, positions=(2, 4)),
            "from tokens 2, 4, so there",
        ),
        (ZeroTuning(gamma=2.0), ZeroTuning(gamma=3.0, layers=[1]), "would act twice on the same heads"),
        (
            METHODS["scaling-unnormalised"],
            ACT(),
            "rows do not add up to 1, and act would take shares",
        ),
    ]
    for one, two, told in pairs:
        with pytest.warns(NothingEdited), one(model), pytest.raises(UsageError, match=told), two(model):
            pass
    assert state(model) == before
    given = inputs("llama")
    with ZeroTuning(layers=[0])(model), ZeroTuning(layers=[1])(model), KnockOut(layers=[2])(model):
        logits(model, given)


def test_a_replaced_output_cannot_be_measured() -> None:
    opened = open_model(build("llama"))
    batch = collate([Prompt(0, (5, 6, 7), ("x",) * 3, "made")])
    real = torch.ones(1, 3) > 0
    with (
        watched(opened.module, real, lambda *_: None),
        pytest.raises(ModelError, match="measured and replaced at the same time"),
    ):
        edited_output(opened, batch, lambda site, call, output: output)


def test_returned_maps_under_two_mitigations_are_the_edited_ones() -> None:
    model, given = build("llama"), inputs("llama", batch=2, length=13, padding="left")
    model.set_attn_implementation("eager")
    real = given["attention_mask"] != 0
    stack = (METHODS["zero-tuning"], METHODS["scaling"])
    with torch.no_grad():
        plain = model(**given, output_attentions=True).attentions[0].double()
        with stack[0](model), stack[1](model):
            found = model(**given, output_attentions=True).attentions[0].double()
    expected = plain
    for mitigation in stack:
        expected = definition(mitigation, real)(Site("text", 0), expected)
    rows = real[:, None].expand(-1, plain.shape[1], -1)
    torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-6)
