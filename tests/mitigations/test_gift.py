"""GIFT equals its definition layer by layer, from the saliency to the amplified rows, in every way a prompt is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.key_sets import Shares
from sinklens.kernels.spec import AttentionCall
from sinklens.mitigations import GIFT, PAI, PAINT, VAR, NothingEdited, ZeroTuning, chosen_methods
from sinklens.mitigations.asking import label_of
from sinklens.mitigations.gift import amplified
from sinklens.mitigations.recipes import load_recipe, recipe_for
from sinklens.models.anatomy import find_anatomy
from sinklens.models.opening import open_model
from sinklens.tracers import signals as sig
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics, sites
from sinklens.tracers.executor import trace

from ..families import FAMILIES, IMAGE, LAYERS, VISION_END, VISION_START, build, inputs
from ..pictures import opened_vlm, picture_prompt
from .dense import full_map, mixed
from .layerwise import CLASSES, held_against, reader, visual_of
from .test_generating import generated, model_logits
from .test_layer_by_layer import last_rows
from .test_with import logits, state

MARKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")


class ByDefinition:
    """Collects the maps of the saliency layers, and rewrites those of the edited ones."""

    def __init__(
        self,
        family: str,
        given: dict[str, Tensor],
        *,
        alpha: float = 5.0,
        watched: tuple[int, ...] = (1,),
        edited: tuple[int, ...] = (2, 3),
        words: tuple[int, ...] | None = None,
        first: int | None = None,
    ) -> None:
        self.alpha, self.watched, self.edited, self.words = alpha, watched, edited, words
        ids = given["input_ids"]
        self.real = given["attention_mask"] != 0
        self.visual = visual_of(given)
        marks = (ids == VISION_START) | (ids == VISION_END)
        behind = self.visual.cumsum(1) > 0
        self.question = behind & self.real & ~self.visual
        if family in MARKED:
            self.question &= ~marks
        if first is not None:
            self.question[:, first:] = False
        self.rows = last_rows(self.real, first)
        self.maps: dict[int, Tensor] = {}

    def keep(self, site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        if site.layer in self.watched:
            self.maps[site.layer] = full_map(call)
        return output

    def gain(self) -> Tensor:
        """exp(alpha g) `[batch key]`."""
        gain = torch.ones_like(self.real, dtype=torch.float64)
        for b in range(len(gain)):
            v = self.visual[b].nonzero()[:, 0]
            own = self.real[b].nonzero()[:, 0]
            q = [
                i
                for i in self.question[b].nonzero()[:, 0].tolist()
                if i and self.question[b, i - 1]
                and (self.words is None or (own == i).nonzero().item() in self.words)
            ]  # fmt: skip
            means = []
            for weights in self.maps.values():
                rises = (weights[b][:, q][:, :, v] - weights[b][:, [i - 1 for i in q]][:, :, v]).clamp(min=0)
                kept = rises.sum((1, 2)).topk(len(rises) // 2).indices
                means.append(rises[kept].mean((0, 1)))
            g = torch.stack(means).mean(0)
            g = g.clamp(g.mean() - 3 * g.std(), g.mean() + 3 * g.std())
            gain[b, v] = torch.exp(self.alpha * (g - g.min()) / (g.max() - g.min()))
        return gain

    def __call__(self, site: Site, call: AttentionCall) -> Tensor:
        weights = full_map(call)
        if site.layer in self.watched and not self.kept_before:
            self.maps[site.layer] = weights
        if site.layer not in self.edited:
            return mixed(weights, call)
        gain, new = self.gain(), weights.clone()
        learned = 1.0 - weights.sum(-1, keepdim=True)
        for b in range(len(weights)):
            for row in self.rows[b].nonzero()[:, 0].tolist():
                a = weights[b, :, row].clone()
                v, q = self.visual[b], self.question[b]
                lookers = a[:, v].sum(1).topk(len(a) // 2).indices
                before = a[lookers][:, v].sum()
                a[lookers] *= gain[b]
                scale = a[lookers][:, v].sum() / before if before > 0 else 1.0
                readers = a[:, q].sum(1).topk(len(a) // 2).indices
                a[readers] = torch.where(q, a[readers] * scale, a[readers])
                new[b, :, row] = a / (a.sum(1, keepdim=True) + learned[b, :, row])
        return mixed(new, call)

    kept_before = False

    def ahead(self, model: Any, given: dict[str, Tensor]) -> ByDefinition:
        """The maps of a pass of the model as it is."""
        tap = AttentionTap(
            sites(model, find_anatomy(model).main, "attention"), no_statistics, ignore, edit=self.keep
        )
        with tap.attached(model):
            logits(model, given)
        self.kept_before = True
        return self


@pytest.mark.parametrize("family", CLASSES)
def test_it_equals_its_definition(family: str) -> None:
    model, given = reader(family, batch=3)
    definition = ByDefinition(family, given)
    with GIFT()(model) as effect, held_against(model, definition.real, definition) as apart:
        logits(model, given)
    if family not in ("mistral", "gemma3_text", "gemma3"):  # a window may have lost the picture
        assert min(apart[2], apart[3]) > 1e-3
    assert apart[0] == apart[1] == 0.0
    assert effect.acted
    assert set(effect.by_layer) <= {2, 3}


CASES: dict[str, tuple[GIFT, dict[str, Any]]] = {
    "two layers watched": (GIFT(saliency=(0, 1), alpha=2.0), {"watched": (0, 1), "alpha": 2.0}),
    "words": (GIFT(words=(14, 15, 18, 19)), {"words": (14, 15, 18, 19)}),
    "watched later than edited": (
        GIFT(saliency=2, layers=(0, 1, 2, 3)),
        {"watched": (2,), "edited": (0, 1, 2, 3)},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llava", "qwen2_vl"])
def test_layers_and_words(family: str, case: str) -> None:
    mitigation, options = CASES[case]
    model, given = reader(family, batch=2, length=23)
    definition = ByDefinition(family, given, **options)
    if case == "watched later than edited":
        definition.ahead(model, given)
    logits(model, given)  # the first call of some models leaves hooks of transformers' own
    before = state(model)
    with mitigation(model) as effect, held_against(model, definition.real, definition):
        logits(model, given)
    assert effect.acted
    assert state(model) == before


@pytest.mark.parametrize("mitigation", [GIFT(), GIFT(saliency=2, layers=(0, 1, 2, 3))], ids=["", "ahead"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_it_generates_what_fresh_passes_say(family: str, mitigation: GIFT) -> None:
    """With a cache and without, beams, a static cache; steps are the definition's rows of the whole sequence."""
    model, given = build(family), inputs(family, batch=2, length=11, padding="left")
    plain = generated(model, given)
    with mitigation(model) as effect:
        found = generated(model, given)
        fresh = generated(model, given, use_cache=False)
        static = generated(model, given, cache_implementation="static")
    for step, values in enumerate(found.logits):
        torch.testing.assert_close(values, fresh.logits[step], rtol=0, atol=3e-4)
        torch.testing.assert_close(values, static.logits[step], rtol=0, atol=3e-4)
    assert not torch.allclose(found.logits[0], plain.logits[0], atol=1e-3)
    assert effect.acted
    with mitigation(model):
        beams, anew = (generated(model, given, num_beams=2, use_cache=cache) for cache in (True, False))
    torch.testing.assert_close(beams.sequences, anew.sequences)
    torch.testing.assert_close(beams.sequences_scores, anew.sequences_scores, rtol=0, atol=3e-4)


def test_decoding_equals_the_definition_on_the_whole_sequence() -> None:
    model, given = build("llava"), inputs("llava", batch=2, length=15, padding="left")
    prompt = given["input_ids"].shape[1] - 4
    definition = ByDefinition("llava", given, first=prompt)
    tap = AttentionTap(
        sites(model, find_anatomy(model).main, "attention"),
        no_statistics,
        ignore,
        edit=lambda site, call, output: definition(site, call).to(output.dtype),
    )
    with tap.attached(model):
        expected = logits(model, {**given, "use_cache": False})  # type: ignore[dict-item]
    with GIFT()(model):
        found = torch.stack([model_logits(model, given, prompt, at) for at in range(5)], 1)
    limit = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected[:, prompt - 1 :], rtol=0, atol=limit)


def test_golden_row() -> None:
    """Two of four heads look, two read; one number for how much more they look."""
    look = [[0.4, 0.2], [0.1, 0.1], [0.3, 0.3], [0.05, 0.05]]
    read = [0.1, 0.5, 0.1, 0.6]
    mass = torch.tensor([[[*v, q]] for v, q in zip(look, read, strict=True)], dtype=torch.float64)[None]
    rest = 1.0 - mass.sum(-1)
    flags = torch.tensor([[True, True, False]])
    gain = torch.tensor([[3.0, 1.0, 1.0]], dtype=torch.float64)
    found = amplified(Shares(mass, rest, torch.zeros_like(rest)), gain, flags, ~flags)
    scale = (3 * 0.4 + 0.2 + 3 * 0.3 + 0.3) / 1.2
    expected = torch.tensor([[3, 1, 1], [1, 1, scale], [3, 1, 1], [1, 1, scale]], dtype=torch.float64)
    torch.testing.assert_close(found.factors[0, :, 0], expected)
    torch.testing.assert_close(found.divisor[0, :, 0], (expected * mass[0, :, 0]).sum(-1) + rest[0, :, 0])


@pytest.mark.parametrize("mitigation", [GIFT(), GIFT(saliency=2, layers=(0, 1, 2, 3))], ids=["", "ahead"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_trace_of_prompts_with_pictures_records_what_it_made(family: str, mitigation: GIFT) -> None:
    """Kinds come from the prompt's spans; nothing is recorded twice where the prompt is read ahead."""
    opened, prompt = opened_vlm(family), picture_prompt(family, 19)
    plain = trace(opened, [prompt]).records[0]
    with mitigation(opened) as effect:
        found = trace(opened, [prompt]).records[0]
    assert effect.acted
    assert set(found.arrays) == set(plain.arrays)
    vision = [name for name in plain.arrays if name.startswith("vision")]
    assert vision
    assert all((found.arrays[name] == plain.arrays[name]).all() for name in vision)
    received = sig.ATTENTION_RECEIVED.name
    assert found.arrays[received].shape == plain.arrays[received].shape
    assert (found.arrays[received] != plain.arrays[received]).any()


def test_nothing_to_amplify_and_what_is_refused() -> None:
    model, given = build("llava"), inputs("llava", batch=2, length=13)
    plain, before = logits(model, given), state(model)
    with GIFT(alpha=0.0)(model) as effect:
        assert effect.identity
        assert torch.equal(logits(model, given), plain)
    with pytest.warns(NothingEdited, match="no two words of a question follow"), GIFT(words=(0,))(model):
        assert torch.equal(logits(model, given), plain)
    text = {"input_ids": torch.randint(5, 300, (1, 9))}
    with pytest.warns(NothingEdited, match="no prompt has visual tokens"), GIFT()(model):
        logits(model, text)
    with pytest.raises(ModelError, match="needs a model that reads pictures"), GIFT()(build("llama")):
        pass
    with (
        pytest.raises(ModelError, match="read in pieces"),
        GIFT()(model),
    ):
        generated(model, given, prefill_chunk_size=7)
    with pytest.raises(UsageError, match="there is no layer 9"), GIFT(saliency=9)(model):
        pass
    cache = model(**given, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ModelError), GIFT()(model):
        model(torch.full((2, 1), 7), past_key_values=cache)
    with ZeroTuning(gamma=3.0)(model), GIFT()(model) as effect:
        logits(model, given)
    assert effect.acted
    assert state(model) == before
    for bad in ({"alpha": -1.0}, {"alpha": 51.0}, {"saliency": ()}, {"words": (-1,)}):
        with pytest.raises(UsageError):
            GIFT(**bad)  # type: ignore[arg-type]
    assert GIFT(saliency=11).watched(32) == GIFT().watched(32) == (11,)
    assert list(GIFT().own_layers(32)) == list(range(12, 23))
    assert FAMILIES["llava"].kind == "vlm"
    assert LAYERS == 4
    assert IMAGE in given["input_ids"]


def test_it_is_named_on_the_command_line_and_kept_in_recipes(tmp_path: Path) -> None:
    opened = open_model(build("llava"))
    found = chosen_methods(
        "gift:alpha=2:saliency=0:words=14-16,gift:saliency=0+1,paint:start=0:beta=0,pai:alpha=1,var:dims=3"
    )
    assert found == (
        GIFT(alpha=2.0, saliency=0, words=(14, 15, 16)),
        GIFT(saliency=(0, 1)),
        PAINT(start=0, beta=0.0),
        PAI(alpha=1.0),
        VAR(dims=(3,)),
    )
    for method in found:
        recipe_for(method, opened).save(tmp_path / "recipe.json")
        assert load_recipe(tmp_path / "recipe.json").mitigation == method
        assert chosen_methods(label_of(method)) == (method,)
    with pytest.raises(UsageError, match="alpha must be one number, got '1-3'"):
        chosen_methods("gift:alpha=1-3")
