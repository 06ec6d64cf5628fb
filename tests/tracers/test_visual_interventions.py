"""Masks and held states against the definitions: layers run by hand on fewer rows, rows taken out, keys masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.inputs.spans import Kind
from sinklens.tracers import signals as sig
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.interventions import Intervention
from sinklens.tracers.states import residual_tap
from sinklens.tracers.visual_interventions import (
    SublayersSkipped,
    TokensRemoved,
    VisualExit,
    VisualInjected,
    VisualKeysBlocked,
    sublayer_writers,
)
from tests.pictures import VLMS, ByHand, batch_for, opened_vlm, picture_prompt, processed
from tests.tracers.test_families import batch_of, opened, settings
from tests.vlms import VLMS as CLASSES

families = pytest.mark.parametrize("family", VLMS)
IMPLEMENTATIONS = ("eager", "sdpa")


def logits(model: Any, batch: Batch, change: Intervention | None = None) -> Tensor:
    if change is None:
        return forward(model.module, batch).logits[0]
    with change.applied(model, batch) as acted:
        made = forward(model.module, batch).logits[0]
    assert acted.edited > 0
    return made


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


class Case:
    """A model with its layers by hand, and the same model under either kind of mask."""

    def __init__(self, family: str) -> None:
        self.model = opened_vlm(family, eager=True)
        self.batch = batch_for(picture_prompt(family, 17))
        self.hand = ByHand(self.model, self.batch)
        self.visual = torch.from_numpy(self.batch.prompts[0].visual.spans.visual)  # type: ignore[union-attr]
        self.every = torch.ones_like(self.visual)

    def check(self, change: Intervention, wanted: Tensor, rows: Tensor) -> None:
        module: Any = self.model.module
        for implementation in IMPLEMENTATIONS:
            module.set_attn_implementation(implementation)
            before = settings(module)
            usual = logits(self.model, self.batch)
            found = logits(self.model, self.batch, change)
            close(found[rows], wanted)
            assert (found[rows] - usual[rows]).abs().max() > 1e-3
            assert settings(module) == before
        module.set_attn_implementation("eager")


@families
def test_layers_run_by_hand_are_the_model(family: str) -> None:
    case = Case(family)
    close(case.hand.run(lambda layer: case.every), logits(case.model, case.batch))


@families
@pytest.mark.parametrize("enters", [1, 3, 4])
def test_injection_equals_splicing_the_picture_in(family: str, enters: int) -> None:
    case = Case(family)
    wanted = case.hand.run(lambda layer: case.every if layer >= enters else ~case.visual)
    if enters < 4:
        wanted = wanted[~case.visual]
    case.check(VisualInjected(enters), wanted, ~case.visual)


@families
@pytest.mark.parametrize("leaves", [0, 1, 3])
def test_exit_equals_dropping_the_picture(family: str, leaves: int) -> None:
    case = Case(family)
    wanted = case.hand.run(lambda layer: case.every if layer < leaves else ~case.visual)
    case.check(VisualExit(leaves), wanted, ~case.visual)


@families
def test_removed_tokens_might_as_well_not_be_there(family: str) -> None:
    """Some visual tokens and one of the text; the others keep their positions, windows and two-dimensional ones too."""
    case = Case(family)
    places = [*case.visual.nonzero()[1:4, 0].tolist(), len(case.visual) - 5]
    kept = case.every.clone()
    kept[places] = False
    case.check(TokensRemoved(Chosen.at(places)), case.hand.run(lambda layer: kept), kept)


@families
@pytest.mark.parametrize("sublayers", [(1.0,), (0.5, 1.0, 2.5)])
def test_skipped_sublayers_add_nothing_to_the_chosen_rows(family: str, sublayers: tuple[float, ...]) -> None:
    """The chosen rows of the state after a block are those before it where both sublayers are skipped; the dense way:
    a plain forward in which the parts' outputs are multiplied by a mask of rows."""
    case = Case(family)
    change, model = SublayersSkipped(sublayers), case.model
    handles = []
    for sublayer in sublayers:
        block = model.anatomy.main.blocks[int(sublayer)]
        path = f"{block.path}.mlp" if sublayer % 1 else f"{block.path}.self_attn"

        def dense(module: Any, args: Any, output: Any) -> Any:
            keep = (~case.visual).float()[None, :, None]
            return (output[0] * keep, *output[1:]) if isinstance(output, tuple) else output * keep

        handles.append(model.module.get_submodule(path).register_forward_hook(dense))
    wanted = logits(model, case.batch)
    for handle in handles:
        handle.remove()
    case.check(change, wanted, case.every)


@families
def test_skipping_a_whole_block_leaves_the_chosen_rows_as_they_were(family: str) -> None:
    case, seen = Case(family), {}
    with (
        SublayersSkipped((1.0, 1.5)).applied(case.model, case.batch),
        residual_tap(case.model.module, case.model.anatomy.main, seen.__setitem__),
    ):
        forward(case.model.module, case.batch)
    before, after = seen[0][0], seen[1][0]
    deep = case.hand.outer.get("deepstack_visual_embeds")
    if deep is None:
        torch.testing.assert_close(after[case.visual], before[case.visual])
    assert (after - before)[~case.visual].abs().min(1).values.max() > 1e-4


@families
def test_a_knock_out_hides_keys_from_the_text_only(family: str) -> None:
    """Under the mask, text gives the chosen keys nothing and other visual tokens still see them."""
    model, prompt = opened_vlm(family), picture_prompt(family, 17)
    batch = batch_for(prompt)
    assert prompt.visual is not None
    first = int(prompt.visual.spans.visual.nonzero()[0][0])
    plan = TracePlan(frozenset({sig.ATTENTION_RECEIVED, sig.VISIBLE_QUERIES}))
    plain = trace_batch(model, batch, plan).records[0]["visible_queries"]
    with VisualKeysBlocked(Chosen.at([first]), (1, 2)).applied(model, batch) as acted:
        record = trace_batch(model, batch, plan).records[0]
    assert acted.edited == 2
    seen = record["visible_queries"]
    assert (seen[[0, 3]] == plain[[0, 3]]).all()
    later = (~prompt.visual.spans.visual)[first:].sum()
    windowed = plain[1:3, first].min() < later
    assert windowed or (seen[1:3, first] == plain[1:3, first] - later).all()
    assert (seen[1:3, first] >= 1).all()
    others = [i for i in range(len(prompt)) if i != first]
    assert (seen[:, others] == plain[:, others]).all()


def grown(prompt: Any, tokens: list[int]) -> Any:
    """The prompt with an answer behind it."""
    from dataclasses import replace

    import numpy as np

    ids = (*prompt.token_ids, *tokens)
    spans = prompt.visual.spans
    kinds = np.concatenate([spans.kinds, np.full(len(tokens), Kind.GENERATED)])
    given = {
        name: torch.cat([value, torch.zeros(1, len(tokens), dtype=value.dtype)], 1)
        if name.endswith("type_ids")
        else value
        for name, value in prompt.visual.inputs.items()
    }
    visual = replace(prompt.visual, spans=replace(spans, kinds=kinds), inputs=given)
    return replace(prompt, token_ids=ids, pieces=tuple(map(str, ids)), visual=visual)


@families
@pytest.mark.parametrize(
    "change",
    [VisualInjected(2), VisualExit(1), TokensRemoved(Chosen.at([3, 5])), SublayersSkipped((0.5, 1.0))],
    ids=str,
)
def test_generation_from_a_cache_is_the_changed_model_token_by_token(
    family: str, change: Intervention
) -> None:
    """Every step of cached decoding against a whole pass over everything so far, without a cache."""
    model, prompt = opened_vlm(family), picture_prompt(family, 17)
    batch = batch_for(prompt)
    module: Any = model.module
    with change.applied(model, batch):
        made = module.generate(
            **batch.inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True, attention_mask=torch.ones_like(batch.inputs["input_ids"]),
        )  # fmt: skip
    answer = made.sequences[0, len(prompt) :].tolist()
    whole = batch_for(grown(prompt, answer))
    wanted = logits(model, whole, change)[len(prompt) - 1 : -1]
    close(torch.cat(made.logits), wanted)
    assert (wanted - logits(model, whole)[len(prompt) - 1 : -1]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_renumbering_equals_a_shorter_prompt(implementation: str) -> None:
    model, prompt = opened_vlm("llava"), picture_prompt("llava", 17)
    module: Any = model.module
    batch = batch_for(prompt)
    hand = ByHand(opened_vlm("llava", eager=True), batch)
    module.set_attn_implementation(implementation)
    places = [4, 5, 9]
    kept = torch.ones(len(prompt), dtype=torch.bool)
    kept[places] = False
    with torch.no_grad():
        short = module(inputs_embeds=hand.entered[:, kept], use_cache=False).logits[0]
    change = TokensRemoved(Chosen.at(places), "renumber")
    close(logits(model, batch, change)[kept], short)
    assert (logits(model, batch, TokensRemoved(Chosen.at(places)))[kept] - short).abs().max() > 1e-2
    settled = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with change.applied(model, batch):
        found = module.generate(
            **batch.inputs, attention_mask=torch.ones_like(batch.inputs["input_ids"]), **settled
        )
    wanted = module.generate(inputs_embeds=hand.entered[:, kept], **settled)
    assert found[0, len(prompt) :].tolist() == wanted[0, -4:].tolist()


def test_renumbering_is_refused_where_positions_are_no_single_numbers() -> None:
    for family, why in (("qwen2_5_vl", "M-RoPE"), ("gemma3", "window")):
        model, batch = opened_vlm(family), batch_for(picture_prompt(family))
        change = TokensRemoved(Chosen.at([3]), "renumber")
        with pytest.raises(ModelError, match="renumbered") as refused, change.applied(model, batch):
            pass
        assert why in str(refused.value.detail)


def test_text_alone_has_nothing_to_inject() -> None:
    model, batch = opened("llama"), batch_of("llama", 9)
    with pytest.raises(DataError, match="token of a picture"), VisualInjected(1).applied(model, batch):
        pass


def test_removal_by_position_works_on_text_and_padding() -> None:
    """Nothing depends on removed tokens any more; padding is counted off."""
    model = opened("llama")
    for side in (None, "left", "right"):
        batch = batch_of("llama", 17, side)
        change = TokensRemoved(Chosen.at([3, 4]))
        other = Batch({**batch.inputs, "input_ids": batch.inputs["input_ids"].clone()}, batch.valid)
        assert batch.valid is not None
        for row, valid in enumerate(batch.valid):
            other.inputs["input_ids"][row, valid.nonzero()[3:5, 0]] = 77
        chosen = change.chosen.mask(batch)
        with change.applied(model, batch) as acted:
            found = forward(model.module, batch).logits[batch.valid & ~chosen]
            again = forward(model.module, other).logits[batch.valid & ~chosen]
        torch.testing.assert_close(found, again)
        assert acted.edited == 2 * 2 * 4 * 2


def test_layers_and_sublayers_that_do_not_exist() -> None:
    model, batch = opened_vlm("llava"), batch_for(picture_prompt("llava"))
    for change in (
        VisualInjected(5),
        VisualExit(-1),
        VisualKeysBlocked(layers=(2, 4)),
        SublayersSkipped((4.0,)),
        SublayersSkipped((1.25,)),
    ):
        with pytest.raises(UsageError, match="layer"), change.applied(model, batch):
            pass
    assert sublayer_writers(model, 1.5) == ("model.language_model.layers.1.mlp",)


def test_probes_of_other_shapes_are_left_alone() -> None:
    model, batch = opened_vlm("llava"), batch_for(picture_prompt("llava", 17))
    other = batch_for(picture_prompt("llava", 12))
    usual = logits(model, other)
    with VisualExit(0).applied(model, batch) as acted:
        assert torch.equal(forward(model.module, other).logits[0], usual)
    assert acted.edited == 0


@pytest.mark.parametrize("name", list(CLASSES))
def test_every_class_of_models_with_its_real_processor(name: str) -> None:
    """Tiles, newline tokens, pictures before BOS, two-way prefixes: injection, exit, removal by hand and by mask."""
    model, batch = processed(name, eager=True)
    hand = ByHand(model, batch)
    prompt = batch.prompts[0]
    assert prompt.visual is not None
    visual = torch.from_numpy(prompt.visual.spans.visual)
    every = torch.ones_like(visual)
    close(hand.run(lambda layer: every), logits(model, batch))
    kept = every.clone()
    kept[visual.nonzero()[1::2, 0]] = False
    gone = Chosen.at((~kept).nonzero()[:, 0].tolist())
    module: Any = model.module
    for implementation in IMPLEMENTATIONS:
        module.set_attn_implementation(implementation)
        inside = hand.run(lambda layer: every if layer >= 2 else ~visual)[~visual]
        close(logits(model, batch, VisualInjected(2))[~visual], inside)
        close(
            logits(model, batch, VisualExit(2))[~visual],
            hand.run(lambda layer: every if layer < 2 else ~visual),
        )
        close(logits(model, batch, TokensRemoved(gone))[kept], hand.run(lambda layer: kept))
