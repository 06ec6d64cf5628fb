"""Token pruners on the bundled model, judged against as many random tokens: rules of known worth get their verdicts."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sinklens.core.errors import DataError, UsageError
from sinklens.evaluation.answers import Answers, answer_positions
from sinklens.evaluation.pruners import DivPrune, FastV, Pruner, Read
from sinklens.inputs.cutting import cut_prompt
from sinklens.inputs.spec import Prompt
from sinklens.models.opening import open_model
from sinklens.pipeline.pruning import pruning_probe, reads
from sinklens.testbeds.vision import Scenes, vision_recipes
from sinklens.testbeds.vision_prompts import scene_prompts
from sinklens.testbeds.vision_train import held_out_scenes
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.chosen import Chosen
from sinklens.tracers.visual_interventions import TokensRemoved, VisualExit

RECIPE = vision_recipes["vlm-shapes"]


@pytest.fixture(scope="module")
def model() -> Any:
    return open_model("bundled:vlm-shapes", dtype="float32")


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return held_out_scenes(RECIPE, 40)


@pytest.fixture(scope="module")
def prompts(scenes: Scenes) -> tuple[Prompt, ...]:
    return scene_prompts(RECIPE.task, scenes)


@dataclass(frozen=True, kw_only=True)
class Oracle(Pruner):
    """Keeps cells that show objects before all others, or after them: what helps and what harms is known."""

    objects: bool = True
    shown: dict[bytes, np.ndarray] = field(default_factory=dict, compare=False)

    name: ClassVar[str] = "oracle"

    @property
    def leaves_at(self) -> int:
        return 2

    @property
    def label(self) -> str:
        return "objects" if self.objects else "background"

    def kept(self, read: Read, count: int) -> np.ndarray:
        shown = self.shown[read.features.tobytes()]
        return np.sort((-shown if self.objects else shown).argsort(kind="stable")[:count])


def test_what_pruners_read_is_what_the_model_computed(prompts: tuple[Prompt, ...]) -> None:
    """Against transformers' own attention maps and embeddings of the prompt without its answer."""
    from transformers import AutoModelForImageTextToText

    from sinklens.testbeds.api import BUNDLED

    folder = BUNDLED / "vlm-shapes"
    other: Any = AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype="float32"
    )
    opened = open_model("bundled:vlm-shapes", dtype="float32")
    for prompt in prompts[:2]:
        (found,) = reads(opened, [prompt], None)
        asked = cut_prompt(prompt, int(answer_positions(prompt)[0]))
        assert asked.pieces[-1] == "?"
        output = forward_with_maps(other, asked)
        maps = np.stack([layer[0].mean(0).numpy() for layer in output.attentions])
        cells = slice(1, 26)
        assert found.attention["last"] == pytest.approx(maps[:, -1, cells], abs=1e-6)
        assert found.attention["text"] == pytest.approx(maps[:, 26:, cells].mean(1), abs=1e-6)
        assert found.features == pytest.approx(output.hidden_states[0][0, cells].numpy(), abs=1e-5)
        assert found.sinks is None
        expected = np.sort(np.argsort(-maps[1, -1, cells], kind="stable")[:9])
        assert FastV().kept(found, 9).tolist() == expected.tolist()


def forward_with_maps(model: Any, prompt: Prompt) -> Any:
    import torch

    batch = collate([prompt])
    with torch.no_grad():
        return model(**batch.inputs, output_attentions=True, output_hidden_states=True)


def test_rules_of_known_worth_get_the_right_verdicts(
    model: Any, prompts: tuple[Prompt, ...], scenes: Scenes
) -> None:
    objects = ~RECIPE.task.background(scenes)
    features = [one.features.tobytes() for one in reads(model, prompts, None)]
    shown = dict(zip(features, objects.astype(int), strict=True))
    pruners = [
        Oracle(shown=shown),
        Oracle(objects=False, shown=shown),
        FastV(),
        FastV(recency=True, sigma=0.0),
        FastV(recency=True),
    ]
    pruners += [FastV(sinks="dropped"), FastV(padding=True)]
    steps: list[tuple[int, int]] = []
    found = pruning_probe(
        model,
        prompts,
        pruners,
        keeps=[0.7],
        draws=2,
        progress=lambda done, total: steps.append((done, total)),
    )
    rows = {row["pruner"]: row for row in found["rows"]}
    assert rows["objects"]["versus"]["random tokens"]["verdict"] == "better than random tokens"
    assert rows["objects"]["loss"]["mean"] < rows["objects"]["random_loss"]["mean"] / 2
    assert rows["background"]["versus"]["random tokens"]["verdict"] == "worse than random tokens"
    assert {row["kept"] for row in rows.values()} == {18.0}
    # Without a slope the ranking is the same, so nothing is compared.
    assert rows["fastv:recency=true:sigma=0"]["versus"]["fastv"]["verdict"] == "the same as fastv"
    assert rows["fastv:recency=true:sigma=0"]["versus"]["fastv"]["same_tokens"] == 1.0
    assert rows["fastv"]["versus"].keys() == {"random tokens"}
    reasons = {item["pruner"]: item["why"] for item in found["skipped"]}
    assert reasons.keys() == {"fastv:sinks=dropped", "fastv:padding=true"}
    assert "no sink dims" in reasons["fastv:sinks=dropped"]
    (fit,) = found["fits"]
    assert fit["pruner"] == "fastv:recency=true"
    assert fit["layer"] == 1
    assert fit["n"] == found["n_calibration"] == 16
    assert steps[-1] == (24, 24)
    assert found["verdict"].startswith("Of 5 prunings ")
    p_values = [r["versus"]["random tokens"]["p_value"] for r in rows.values()]
    assert all(
        row["versus"]["random tokens"]["p_holm"] >= p for row, p in zip(rows.values(), p_values, strict=True)
    )


def test_changes_are_those_of_tokens_that_are_gone(model: Any, prompts: tuple[Prompt, ...]) -> None:
    """One pruner by hand: from layer K on (FastV), from the start (DivPrune), positions kept."""
    two = prompts[:2]
    found = pruning_probe(
        model, two, [FastV(), DivPrune()], keeps=[0.5], draws=1, calibration=prompts[2:4], sinks=None
    )
    for row, pruner in zip(found["rows"], (FastV(), DivPrune()), strict=True):
        changes = []
        for prompt, read in zip(two, reads(model, two, None), strict=True):
            gone = [1 + cell for cell in range(25) if cell not in pruner.kept(read, 13).tolist()]
            chosen = Chosen.at({prompt.index: gone})
            change = TokensRemoved(chosen) if isinstance(pruner, DivPrune) else VisualExit(2, chosen)
            answers = Answers(model, prompt)
            changes.append(answers.under(change).loss - answers.under().loss)
        assert row["loss"]["mean"] == pytest.approx(float(np.mean(changes)), rel=1e-6)


def test_leaving_at_the_first_layer_is_removal(model: Any, prompts: tuple[Prompt, ...]) -> None:
    chosen = Chosen.at({prompts[0].index: [3, 4, 9]})
    batch = collate([prompts[0]])
    logits = []
    for change in (VisualExit(0, chosen), TokensRemoved(chosen)):
        with change.applied(model, batch):
            logits.append(forward(model.module, batch).logits)
    assert bool((logits[0] == logits[1]).all())


def test_what_cannot_be_judged_is_refused(model: Any, prompts: tuple[Prompt, ...], scenes: Scenes) -> None:
    unanswered = scene_prompts(RECIPE.task, scenes, answered=False)
    with pytest.raises(DataError, match="Too few prompts with a picture, a question and an answer"):
        pruning_probe(model, unanswered)
    with pytest.raises(DataError, match="2 prompts are among those"):
        pruning_probe(model, prompts[:4], calibration=prompts[2:6])
    with pytest.raises(UsageError, match="none of them twice"):
        pruning_probe(model, prompts, [FastV(), FastV()])
    with pytest.raises(UsageError, match="tokens cannot leave at layer 4"):
        pruning_probe(model, prompts, [FastV(layer=4)])
    with pytest.raises(UsageError, match="share of the visual tokens"):
        pruning_probe(model, prompts, [FastV()], keeps=[1.0])
    with pytest.raises(UsageError, match="calibration is a share"):
        pruning_probe(model, prompts, [FastV()], calibration=1.5)
    with pytest.raises(UsageError, match="or 'search'"):
        pruning_probe(model, prompts, [FastV()], sinks="found")


def test_planted_sinks_and_recency_cost_a_pruner_its_budget(tmp_path: Path) -> None:
    """Four specks that mean nothing get most attention, then what stands late: FastV loses what is asked for.

    Without the specks it keeps objects, the late ones rather than the early ones; corrected for the place it keeps all.
    """
    from sinklens.evaluation.pictures import processor_of
    from sinklens.inputs.vision import load_pictures
    from sinklens.testbeds import plant_testbed

    truth: Any = plant_testbed("retrieval-visual", tmp_path, seed=1)
    bed = open_model(str(tmp_path))
    rows = str(tmp_path / "answers.jsonl")
    given = load_pictures(None, processor_of(bed), bed.module.config, prompts=rows, n=96)
    pruners = [FastV(), FastV(sinks="kept"), FastV(sinks="dropped"), FastV(sinks="dropped", recency=True)]
    found = pruning_probe(bed, given, pruners, keeps=[0.2], draws=1)
    assert found["sinks"]["dims"] == [truth.sink_dim]
    assert found["sinks"]["per_prompt"] == 4.0
    assert found["fits"][0]["sigma"] == pytest.approx(1.0, abs=0.2)
    versus = {row["pruner"]: row["versus"] for row in found["rows"]}
    assert versus["fastv:sinks=kept"]["fastv"]["verdict"] == "the same as fastv"
    assert versus["fastv:sinks=dropped"]["fastv"]["verdict"] == "better than fastv"
    assert versus["fastv:sinks=dropped"]["fastv"]["same_tokens"] == pytest.approx(0.2)
    both = versus["fastv:sinks=dropped:recency=true"]
    assert both["fastv:sinks=dropped"]["verdict"] == "better than fastv:sinks=dropped"
    assert both["random tokens"]["verdict"] == "better than random tokens"
    assert not found["skipped"]


def test_padded_cells_go_first() -> None:
    """Wide pictures in padded squares: 20 of 25 cells show nothing, and PAS keeps none of them before others."""
    from sinklens.inputs.vision import load_pictures
    from tests.vlms import build, processor

    name = "padded to a square"
    made, built = processor(name), build(name)
    rng = np.random.default_rng(0)
    text = {"text": "how many ? two", "question": "how many ?", "answer": "two"}
    rows = [{"image": rng.integers(0, 255, (24, 120, 3), dtype=np.uint8), **text} for _ in range(5)]
    prompts = load_pictures(rows, made, built.config, bos="on").prompts
    opened = open_model(built, tokenizer=made.tokenizer)
    for read in reads(opened, prompts, None):
        padded = read.padding >= 0.5
        assert padded.reshape(5, 5).tolist() == [[row != 2] * 5 for row in range(5)]
        assert not padded[FastV(padding=True).kept(read, 5)].any()
        assert padded[FastV().kept(read, 5)].any()
        assert len(FastV(padding=True).kept(read, 9)) == 9
    found = pruning_probe(opened, prompts, [FastV(), FastV(padding=True)], keeps=[0.2], draws=1)
    assert not found["skipped"]
    assert found["rows"][1]["versus"]["fastv"]["same_tokens"] < 1.0


@pytest.mark.parametrize(("family", "refused"), [("paligemma", True), ("gemma3", False), ("qwen3_vl", False)])
def test_an_answer_that_is_seen_before_it_is_given_is_refused(family: str, refused: bool) -> None:
    """PaliGemma reads the whole prompt as a prefix; Gemma 3 only its pictures; the others nothing."""
    from sinklens.core.errors import ModelError
    from sinklens.inputs.vision import load_pictures
    from tests.vlms import build, processor

    made, built = processor(family), build(family)
    rng = np.random.default_rng(0)
    text = {"text": "how many ? two red", "question": "how many ?", "answer": "two red"}
    rows = [{"image": rng.integers(0, 255, (64, 80, 3), dtype=np.uint8), **text} for _ in range(5)]
    prompts = load_pictures(rows, made, built.config, bos="on").prompts
    opened = open_model(built, tokenizer=made.tokenizer)
    with pytest.raises(ModelError, match="reads its text both ways") if refused else nullcontext():
        found = pruning_probe(opened, prompts, [FastV(recency=True), DivPrune()], keeps=[0.4], draws=1)
        assert len(found["rows"]) == 2


def test_a_pruner_that_keeps_another_number_is_refused(model: Any, prompts: tuple[Prompt, ...]) -> None:
    class Greedy(FastV):
        name: ClassVar[str] = "greedy"

        def kept(self, read: Read, count: int) -> np.ndarray:
            return np.arange(count + 1)

    with pytest.raises(UsageError, match="greedy keeps 14 tokens in place of 13"):
        pruning_probe(model, prompts[:6], [Greedy()], keeps=[0.5])
