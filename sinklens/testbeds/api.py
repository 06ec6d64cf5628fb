"""The testbeds by name: what there is, train one again, plant one."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinklens.core.errors import UsageError
from sinklens.core.registry import Registry
from sinklens.core.suggest import did_you_mean

from .blocks import FAMILIES
from .card import facts, write_card
from .controls import random_control
from .data import InductionTask
from .planting.plant import plant
from .planting.retrieve import REMEDIES, RetrievalTruth, plant_retrieval
from .planting.truth import MassivePlant, SinkPlant, SuperExpertPlant, Truth
from .recipe import Recipe, recipes
from .retrieval import RetrievalTask
from .train import save_checkpoint, train, word_tokenizer
from .vision import VisionRecipe, vision_recipes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BUNDLED = Path(__file__).parent.parent / "checkpoints"
MOE_FAMILIES = ("qwen3_moe", "mixtral")
RETRIEVAL, VISUAL, QUESTIONS = "retrieval-", "retrieval-visual", 256
# `plant` knows qwen2 too, but transformers opens every qwen2 folder with the Qwen2 tokenizer, whatever it holds.
SAVED_FAMILIES = tuple(family for family in FAMILIES if family != "qwen2")


@dataclass(frozen=True)
class TestbedInfo:
    """A testbed as `sinklens testbed list` shows it.

    Attributes:
        kind: `trained` (sinks that emerged) or `planted` (sinks that were put there).
        path: The bundled checkpoint, if there is one.
    """

    __test__ = False  # pytest would take the name for a test class

    name: str
    kind: str
    about: str
    path: Path | None = None


def trained_recipes() -> Registry[Recipe | VisionRecipe]:
    """Every testbed that can be trained, by name."""
    found: Registry[Recipe | VisionRecipe] = Registry(recipes.kind, recipes.listing)
    for name, recipe in (*recipes.items(), *vision_recipes.items()):
        found.register(name)(recipe)
    return found


def list_testbeds() -> list[TestbedInfo]:
    """Trained testbeds first, then the families that can be planted in."""
    trained = [
        TestbedInfo(name, "trained", recipe.about, BUNDLED / name if (BUNDLED / name).is_dir() else None)
        for name, recipe in trained_recipes().items()
    ]
    planted = []
    for family in SAVED_FAMILIES:
        what = (
            "a sink, a massive dim and a Super Expert"
            if family in MOE_FAMILIES
            else "a sink and a massive dim"
        )
        about = f"A tiny random {family} with {what}, planted at places drawn from the seed."
        planted.append(TestbedInfo(f"planted-{family}", "planted", about))
    for sink, (remedy, _) in REMEDIES.items():
        about = f"A head kept from looking things up by the sink that {remedy} is for; with questions, task.jsonl."
        planted.append(TestbedInfo(f"{RETRIEVAL}{sink}", "planted", about))
    about = "A head kept from looking a picture's cell up by visual and text sinks, which var is for; with questions."
    planted.append(TestbedInfo(VISUAL, "planted", about))
    return trained + planted


def train_testbed(
    name: str,
    out: Path | str,
    *,
    seed: int | None = None,
    steps: Collection[int] = (),
    on_step: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Trains a testbed from scratch and saves it, with its card, in `out`.

    Args:
        seed: The recipe's own if None; the bundled checkpoint is the recipe's own.
        steps: Also save the model after these steps, as `out/step-<n>`: training dynamics.
        on_step: Called with the step (1-based), the number of steps and the training loss in nats.

    Raises:
        UsageError: No such testbed, a step the recipe does not reach, or no Pillow for one with pictures.
    """
    recipe = trained_recipes()[name]
    out = Path(out)
    beyond = [step for step in steps if not 0 <= step <= recipe.steps]
    if beyond:
        raise UsageError(f"{name} has no step {beyond[0]}: it trains for {recipe.steps} steps.")

    def report(step: int, loss: float) -> None:
        if on_step is not None:
            on_step(step, recipe.steps, loss)

    if isinstance(recipe, VisionRecipe):
        from .vision_train import require_pillow, save_vision_checkpoint, train_vision

        require_pillow()

        def keep_pictures(step: int, model: PreTrainedModel) -> None:
            save_vision_checkpoint(model, recipe, out / f"step-{step}")

        model = train_vision(recipe, seed=seed, at=steps, on_checkpoint=keep_pictures, on_step=report)
    else:

        def keep(step: int, model: PreTrainedModel) -> None:
            save_checkpoint(model, recipe, out / f"step-{step}")

        model = train(recipe, seed=seed, at=steps, on_checkpoint=keep, on_step=report)
    save_with_card(model, recipe, out, seed)
    return out


def save_with_card(
    model: PreTrainedModel, recipe: Recipe | VisionRecipe, out: Path, seed: int | None = None
) -> None:
    """Saves a trained model; its card is measured on the weights as they are stored."""
    import copy

    recipe = recipe if seed is None else replace(recipe, seed=seed)
    stored = copy.deepcopy(model).bfloat16().float()
    if isinstance(recipe, VisionRecipe):
        from .vision_card import write_vision_card
        from .vision_measure import measure
        from .vision_train import save_vision_checkpoint

        card = write_vision_card(recipe, measure(stored, recipe), stored)
        save_vision_checkpoint(model, recipe, out, card=card)
    else:
        save_checkpoint(model, recipe, out, card=write_card(recipe, facts(stored, recipe), stored))


def planted_config(family: str) -> PretrainedConfig:
    """A config of 6 blocks, 64 dims and, where the family has it, two heads per key head."""
    from transformers import AutoConfig

    task = InductionTask()
    vocabulary = task.vocabulary
    common = {
        "vocab_size": len(vocabulary),
        "bos_token_id": task.bos_id,
        "eos_token_id": None,
        "pad_token_id": vocabulary.index("<pad>"),
    }
    if family == "gpt2":
        return AutoConfig.for_model(family, n_embd=64, n_layer=6, n_head=4, n_positions=512, **common)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    sizes["head_dim"] = 16
    if family == "qwen3_moe":
        sizes |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }
    if family == "mixtral":
        sizes |= {"num_local_experts": 8, "num_experts_per_tok": 2}
    if family == "gemma2":
        sizes |= {"query_pre_attn_scalar": 16}
    return AutoConfig.for_model(family, tie_word_embeddings=family == "gemma2", **sizes, **common)


def planted_model(
    family: str, *, seed: int = 0, strength: float = 40.0, noise: float | None = None
) -> tuple[PreTrainedModel, Truth]:
    """The model of `plant_testbed` in memory; also for `qwen2`, whose folder would open with a wrong tokenizer."""
    config = planted_config(family)
    model = random_control(config, seed)
    rng = np.random.default_rng(seed)
    first, dim = int(rng.integers(0, 3)), int(rng.integers(config.hidden_size))
    blocks = first + 1 + rng.choice(5 - first, size=3, replace=False)
    heads = [(int(block), int(rng.integers(4))) for block in sorted(blocks)]
    # Gemma2's norms keep ordinary tokens near 1, so its massive value must be larger for the same ratio.
    magnitude = 5000.0 if family == "gemma2" else 500.0
    if family in MOE_FAMILIES:
        expert = int(rng.integers(8))
        truth = plant(
            model,
            sinks=[SinkPlant(heads, strength=strength)],
            super_experts=[SuperExpertPlant(first, expert, dim, magnitude=magnitude)],
            noise=noise,
            seed=seed,
        )
    else:
        truth = plant(
            model,
            sinks=[SinkPlant(heads, strength=strength)],
            massive=[MassivePlant(dim, first, magnitude=magnitude)],
            noise=noise,
            seed=seed,
        )
    return model, truth


def plant_testbed(
    family: str,
    out: Path | str,
    *,
    seed: int = 0,
    strength: float | None = None,
    noise: float | None = None,
) -> Truth | RetrievalTruth:
    """Saves a tiny random model with one planted sink on BOS, and `truth.json`, the answer key, beside it.

    The seed draws the weights and the places: three heads in three blocks, the massive dim and, in an MoE family,
    the Super Expert. The folder opens like any checkpoint and brings its own tokenizer and prompts.

    `retrieval-first` and `retrieval-inner` in place of a family save the model of `plant_retrieval` with questions in
    `task.jsonl`: a task of which it is known which mitigation helps. `retrieval-visual` does it for questions about
    pictures, see `plant_visual_retrieval`.

    Args:
        strength, noise: In nats; see `plant`, `plant_retrieval` and `plant_visual_retrieval`, whose defaults hold where
            these are None.

    Raises:
        UsageError: A family that cannot be planted in.
    """
    out = Path(out)
    options = {} if strength is None else {"strength": strength}
    if family.startswith(RETRIEVAL):
        options |= {} if noise is None else {"noise": noise}
    if family == VISUAL:
        from .visual_folder import save_visual_retrieval

        return save_visual_retrieval(out, seed, options)
    if family.removeprefix(RETRIEVAL) in REMEDIES and family.startswith(RETRIEVAL):
        return _save_retrieval(family, out, seed, options)
    if family not in SAVED_FAMILIES:
        known = (*SAVED_FAMILIES, *(f"{RETRIEVAL}{sink}" for sink in REMEDIES), VISUAL)
        raise UsageError(
            f"There is no planted testbed of the family {family!r}.",
            detail=did_you_mean(family, known),
            hint=f"Families: {', '.join(known)}",
        )
    model, truth = planted_model(family, seed=seed, noise=noise, **options)
    save_checkpoint(model, Recipe(f"planted-{family}", family, {}), out, dtype=torch.float32)
    (out / "truth.json").write_text(json.dumps(truth.to_json(), indent=1) + "\n", encoding="utf-8")
    return truth


def _save_retrieval(name: str, out: Path, seed: int, options: dict[str, float]) -> RetrievalTruth:
    task = RetrievalTask()
    sink: Any = name.removeprefix(RETRIEVAL)
    model, truth = plant_retrieval(sink, seed=seed, task=task, **options)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    word_tokenizer(task.vocabulary).save_pretrained(out)
    questions = task.questions(QUESTIONS, seed)
    prompts = [{"text": question["prompt"]} for question in questions[:64]]
    for file, rows in (("task.jsonl", questions), ("sinklens_prompts.jsonl", prompts)):
        (out / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (out / "truth.json").write_text(json.dumps(truth.to_json(), indent=1) + "\n", encoding="utf-8")
    return truth
