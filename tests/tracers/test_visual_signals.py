"""What text reads from pictures, against an obvious re-implementation with whole maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
from sinklens.inputs.spec import Prompt, Visual
from sinklens.inputs.vision import load_pictures
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import ModelInfo, OpenedModel
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import Mode
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.signals_visual import LEAST_ENERGY, MASS_FLOORS, OF_INPUTS, OF_PICTURES, OF_TEXT_QUERIES
from sinklens.tracers.sink_dims import SinkDims, SinkRule
from sinklens.tracers.trace import PromptRecord
from tests import vlms
from tests.families import BOS, IMAGE, VISION_END, VISION_START
from tests.inputs.vision.painting import noise
from tests.kernels.test_memory import Largest
from tests.pictures import opened_vlm, picture_prompt

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
PROCESSED = ("llava_next", "llava_onevision", "internvl", "paligemma")
DIMS = (3, 17, 40)
EVERYTHING = frozenset(OF_INPUTS | OF_TEXT_QUERIES)


class Dense:
    """Whole maps, values and layer inputs of one prompt, with the definitions of VAR spelled out on them."""

    def __init__(self, model: OpenedModel, prompt: Prompt, tau: float) -> None:
        assert prompt.visual is not None
        module: Any = model.module
        self.inputs: list[torch.Tensor] = []
        self.value_out: list[torch.Tensor] = []
        handles = []
        for block in model.anatomy.main.blocks:
            layer = module.get_submodule(block.path)
            handles.append(layer.register_forward_pre_hook(self._keep, with_kwargs=True))
            attention = layer.self_attn
            handles.append(attention.v_proj.register_forward_hook(self._value(attention)))
        module.set_attn_implementation("eager")
        try:
            batch = collate([prompt])
            batch.inputs["output_attentions"] = True
            self.maps = [a[0].double() for a in forward(module, batch).attentions]
        finally:
            module.set_attn_implementation("sdpa")
            for handle in handles:
                handle.remove()
        kinds = torch.as_tensor(prompt.visual.spans.kinds)
        self.visual, self.text = kinds == Kind.VISUAL, kinds == Kind.QUESTION
        self.phi = [x.double()[:, DIMS].abs().amax(-1) / self._rms(x.double()) for x in self.inputs]
        self.sinks = [phi >= tau for phi in self.phi]

    @staticmethod
    def _rms(x: torch.Tensor) -> torch.Tensor:
        return (x.pow(2).mean(-1) + 1e-6).sqrt()

    def _keep(self, module: Any, args: Any, kwargs: Any) -> None:
        self.inputs.append((args[0] if args else kwargs["hidden_states"])[0].detach())

    def _value(self, attention: Any) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            heads = attention.config.num_attention_heads
            width = attention.head_dim
            value = output[0].detach().double().unflatten(-1, (-1, width)).transpose(0, 1)
            value = value.repeat_interleave(heads // len(value), 0)
            weight = attention.o_proj.weight.detach().double().T.unflatten(0, (heads, width))
            self.value_out.append((value @ weight).norm(dim=-1))

        return hook

    def ratio(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass on visual tokens and the share of it on those that are no sinks, `[head, text query]`."""
        rows = self.maps[layer][:, self.text]
        mass = rows[..., self.visual].sum(-1)
        rest = rows[..., self.visual & ~self.sinks[layer]].sum(-1)
        return mass, rest / mass


def traced(model: OpenedModel, prompt: Prompt, tau: float, mode: Mode = Mode.FAITHFUL) -> PromptRecord:
    rule = SinkRule(SinkDims.given(DIMS, model.info.hidden_size), tau)
    return trace(model, [prompt], TracePlan(signals=EVERYTHING, sinks=rule, mode=mode)).records[0]


def case(family: str) -> tuple[OpenedModel, Prompt]:
    """A tiny random model, and a prompt laid out by hand or by the model's own processor."""
    if family in FAMILIES:
        return opened_vlm(family), picture_prompt(family, length=17)
    module = vlms.build(family)
    anatomy = find_anatomy(module)
    main = anatomy.main
    info = ModelInfo(
        f"test/{family}",
        None,
        anatomy.family,
        len(main.blocks),
        main.heads,
        main.kv_heads,
        main.hidden_size,
        0,
        "float32",
    )
    pictures = [noise(64, 96, seed=1), noise(40, 40, seed=2)]
    given = load_pictures([pictures], vlms.processor(family), module.config, question="how many things ?")
    return OpenedModel(module, None, anatomy, info), given.prompts[0]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("family", [*FAMILIES, *PROCESSED])
def test_sinks_ratios_and_selected_rows_are_those_of_the_definition(family: str, mode: Mode) -> None:
    model, prompt = case(family)
    tau = 1.4
    dense, record = Dense(model, prompt, tau), traced(model, prompt, tau, mode)
    some = 0
    for layer in range(model.info.layers):
        np.testing.assert_allclose(record[sig.PHI][layer], dense.phi[layer], rtol=2e-5)
        sinks = record[sig.PHI][layer] >= tau
        assert sinks.tolist() == dense.sinks[layer].tolist()
        some += int((sinks & dense.visual.numpy()).sum())
        mass, ratio = dense.ratio(layer)
        for place, floor in enumerate(MASS_FLOORS):
            taken = ((mass >= floor) & (mass > 0)).double()
            mean = (ratio.nan_to_num(0.0) * taken).sum(-1) / taken.sum(-1)
            found = record[sig.NONSINK_RATIO_MEAN][layer, :, place]
            np.testing.assert_allclose(found, mean, atol=1e-5)
            for rho in (0.1, 0.5, 0.8, 0.9):
                selected = ((mass >= floor) & (mass > 0) & (ratio >= rho)).sum(-1)
                table = record[sig.NONSINK_RATIO][layer][:, MASS_FLOORS.index(floor) :, round(20 * rho) :]
                assert table.sum((1, 2)).tolist() == selected.tolist()
    assert some, "the threshold finds sinks here, so that something is tested"


@pytest.mark.parametrize("family", [*FAMILIES, *PROCESSED])
def test_masses_and_contributions_are_those_of_the_maps(family: str) -> None:
    model, prompt = case(family)
    dense, record = Dense(model, prompt, 1.4), traced(model, prompt, 1.4)
    assert prompt.visual is not None
    delimiter = torch.as_tensor(prompt.visual.spans.is_(Kind.DELIMITER))
    for layer in range(model.info.layers):
        sink, rows = dense.sinks[layer], dense.maps[layer][:, dense.text]
        members = [
            dense.visual & ~sink,
            dense.visual & sink,
            sink & ~dense.visual,
            delimiter & ~sink,
            ~(dense.visual | sink | delimiter),
        ]
        seen = (rows > 0).any(0).any(0)
        received = rows.sum(1) / (rows > 0).sum(1).clamp(min=1)
        for i, member in enumerate(members):
            mass = record[sig.KEY_CLASS_MASS][layer, :, i]
            np.testing.assert_allclose(mass, rows[..., member].sum(-1).mean(-1), atol=2e-6)
            assert record[sig.KEY_CLASS_COUNT][layer, i] == int((member & seen).sum())
            found = record[sig.CONTRIBUTION][layer, :, i]
            if not (member & seen).any():
                assert np.isnan(found).all()
                continue
            added = (received * dense.value_out[layer])[:, member & seen].mean(-1)
            np.testing.assert_allclose(found, added, rtol=1e-4, atol=1e-6)
            norms = dense.value_out[layer][:, member & seen].mean(-1)
            np.testing.assert_allclose(record[sig.CLASS_VALUE_NORM][layer, :, i], norms, rtol=1e-4)
        np.testing.assert_allclose(record[sig.TEXT_RECEIVED][layer][seen], received.mean(0)[seen], atol=2e-6)
        mass, _ = dense.ratio(layer)
        expected = [np.histogram(m, 20, (0, 1))[0] for m in mass.numpy()]
        assert abs(record[sig.VISUAL_MASS][layer] - np.array(expected)).sum() <= 2, "rounding at an edge"
        assert record[sig.NONSINK_RATIO][layer].sum() == int((mass > 0).sum())


def test_other_dims_and_thresholds_can_be_chosen_later() -> None:
    """Every entry from 2 % of the energy on is listed, so a saved run decides any such threshold exactly."""
    model, prompt = opened_vlm("qwen3_vl"), picture_prompt("qwen3_vl", length=17)
    dense, record = Dense(model, prompt, 1.4), traced(model, prompt, 1.4)
    name, size = sig.INPUT_LARGE.name, model.info.hidden_size
    listed = set(zip(*(record[f"{name}_{axis}"].tolist() for axis in ("layer", "pos", "dim")), strict=True))
    expected = set()
    for layer, x in enumerate(dense.inputs):
        ratio = x.double() / dense._rms(x.double())[:, None]
        places = (ratio.square() >= LEAST_ENERGY * size).nonzero().tolist()
        expected |= {(layer, pos, dim) for pos, dim in places}
        typical = ratio.abs().median(0).values
        np.testing.assert_allclose(record[sig.INPUT_TYPICAL][layer], typical, atol=2e-3)
    assert listed == expected
    assert (np.diff(record[f"{name}_layer"]) >= 0).all()
    assert len(listed) == len(record[name])


def test_the_reference_tokens_are_seen_as_they_enter_a_block() -> None:
    model, prompt = opened_vlm("llava"), picture_prompt("llava", length=40)
    dense, record = Dense(model, prompt, 1.4), traced(model, prompt, 1.4)
    places = record[sig.INPUT_REFERENCE.name + "_pos"]
    assert places[:, 0].tolist() == [0] * model.info.layers
    assert places[0, 1] == -1
    assert (places[1:, 1] > 0).all()
    for layer, x in enumerate(dense.inputs):
        for slot, place in enumerate(places[layer]):
            found = record[sig.INPUT_REFERENCE][layer, slot]
            if place < 0:
                assert np.isnan(found).all()
            else:
                expected = (x[place].double().abs() / dense._rms(x[place].double())).numpy()
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_text_has_none_of_it() -> None:
    model = opened_vlm("llava")
    prompt = Prompt(0, tuple(range(5, 25)), ("x",) * 20, "made")
    rule = SinkRule(SinkDims.given(DIMS, model.info.hidden_size), 1.4)
    record = trace(model, [prompt], TracePlan(signals=EVERYTHING, sinks=rule)).records[0]
    assert not {signal.name for signal in OF_PICTURES} & set(record.arrays)
    assert sig.INPUT_TYPICAL.name in record.arrays


def test_without_sink_dims_nothing_is_a_sink() -> None:
    model, prompt = opened_vlm("llava"), picture_prompt("llava")
    record = trace(model, [prompt], TracePlan(signals=EVERYTHING)).records[0]
    assert sig.PHI.name not in record.arrays
    assert (record[sig.KEY_CLASS_COUNT][:, 1] == 0).all()
    assert record[sig.VISUAL_SINK_MASS][..., 1:].sum() == 0
    assert record[sig.INPUT_LARGE].size


def four_pictures(side: int, text: int = 40) -> Prompt:
    """BOS, four pictures of `side` x `side` visual tokens each between marks, and a question."""
    count = side * side
    ids, kinds, grids = [BOS], [Kind.SYSTEM], []
    for picture in range(4):
        start = len(ids) + 1
        ids += [VISION_START, *[IMAGE] * count, VISION_END]
        kinds += [Kind.DELIMITER, *[Kind.VISUAL] * count, Kind.DELIMITER]
        positions = np.arange(start, start + count).reshape(side, side)
        grids.append(PatchGrid(picture, "whole", positions, (0.0, 0.0, 8.0 * side, 8.0 * side)))
    ids, kinds = ids + list(range(5, 5 + text)), kinds + [Kind.QUESTION] * text
    generator = torch.Generator().manual_seed(0)
    given = {
        "pixel_values": torch.randn(16 * count, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2 * side, 2 * side]] * 4),
        "mm_token_type_ids": (torch.tensor([ids]) == IMAGE).long(),
    }
    pictures = tuple(Picture(f"{i}.png", 8 * side, 8 * side, "00") for i in range(4))
    spans = ModalitySpans(np.array(kinds), pictures, tuple(grids))
    return Prompt(0, tuple(ids), ("",) * len(ids), "made", "", Visual(spans, given))


def test_six_thousand_visual_tokens_make_no_map() -> None:
    model, prompt = opened_vlm("qwen2_vl"), four_pictures(39)
    rule = SinkRule(SinkDims.given(DIMS, model.info.hidden_size), 1.4)
    with Largest() as largest:
        record = trace(model, [prompt], TracePlan(signals=EVERYTHING, sinks=rule)).records[0]
    assert prompt.visual is not None
    assert prompt.visual.spans.visual.sum() == 6084
    assert largest.elements < len(prompt) ** 2 / 8, (
        "one head's map is eight times the largest tensor, or more"
    )
    assert sum(array.nbytes for array in record.arrays.values()) < 1500 * len(prompt)
