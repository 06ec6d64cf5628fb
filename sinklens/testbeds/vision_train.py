"""Trains a vision-language recipe on one CPU thread and saves it with everything that turns pictures into tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinklens.core.errors import UsageError

from .train import fit, word_tokenizer
from .vision import QUESTION, Encoded, Scenes, VisionRecipe

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

CHUNK = 2048
"""Pictures drawn at a time; part of what makes a run reproducible."""
SAMPLES = 4
"""Held-out pictures that are stored beside the weights, with their captions."""
PICTURES = 32
"""Held-out pictures that a profile of the checkpoint looks at; the first of them are the samples."""


def build_vision_model(recipe: VisionRecipe, seed: int | None = None) -> LlavaForConditionalGeneration:
    """The untrained model of a recipe; the caller's random state is left as it was."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed if seed is None else seed)
        return LlavaForConditionalGeneration(recipe.config())


def inputs(batch: Encoded) -> dict[str, torch.Tensor]:
    """The arguments of the model's forward. No mask: the padding is on the right, where causal heads do not look."""
    return {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values, "labels": batch.labels}


def _batches(recipe: VisionRecipe, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(seed + 1)
    while True:
        chunk = recipe.task.sample(CHUNK, rng)
        for start in range(0, CHUNK - recipe.batch + 1, recipe.batch):
            yield inputs(recipe.task.encode(chunk.part(slice(start, start + recipe.batch))))


def train_vision(
    recipe: VisionRecipe,
    *,
    seed: int | None = None,
    at: Collection[int] = (),
    on_checkpoint: Callable[[int, PreTrainedModel], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> PreTrainedModel:
    """Trains from scratch, the loss on answers only; arguments and result as `train`'s."""
    seed = recipe.seed if seed is None else seed
    model = build_vision_model(recipe, seed)
    batches = _batches(recipe, seed)
    return fit(model, recipe, batches, at=at, on_checkpoint=on_checkpoint, on_step=on_step)


def held_out_scenes(recipe: VisionRecipe, count: int) -> Scenes:
    """`count` pictures of the same world that training never drew."""
    return recipe.task.sample(count, np.random.default_rng(recipe.evaluation_seed))


def require_pillow() -> None:
    """Before minutes of training rather than after them.

    Raises:
        UsageError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise UsageError(
            "A testbed with pictures needs Pillow.", hint="pip install 'sinklens[vision]'"
        ) from None


def build_processor(recipe: VisionRecipe) -> LlavaProcessor:
    """Pictures of the right size and texts with `<image>` in, ids and pixels in 0 to 1 out; it adds `<s>`."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size: Any = {"height": recipe.task.side, "width": recipe.task.side}
    pictures = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        do_normalize=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        size=size,
        crop_size=size,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=word_tokenizer(recipe.task.vocabulary, eos_token="</s>", extra={"image_token": "<image>"}),
        patch_size=recipe.task.cell,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy takes away again
        image_token="<image>",
    )


def save_vision_checkpoint(
    model: PreTrainedModel,
    recipe: VisionRecipe,
    folder: Path,
    *,
    card: str | None = None,
    prompts: int = 64,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Writes config, safetensors, processor, sample pictures, captions as text prompts, and the card.

    The text prompts have no picture: they are what a tool for texts can show to the language tower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = copy.deepcopy(model)
    torch.nn.Module.to(stored, dtype)
    stored.config.architectures = [type(model).__name__]
    stored.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them for the owner only
    build_processor(recipe).save_pretrained(folder)
    scenes = held_out_scenes(recipe, prompts)
    captions = [caption_text(recipe, scenes, picture) for picture in range(prompts)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in captions)
    (folder / "sinklens_prompts.jsonl").write_text(lines, encoding="utf-8")
    _save_samples(scenes.part(slice(0, SAMPLES)), captions, folder / "samples")
    save_pictures(recipe, scenes.part(slice(0, PICTURES)), folder)
    if card is not None:
        (folder / "card.md").write_text(card, encoding="utf-8")
    return folder


def save_pictures(recipe: VisionRecipe, scenes: Scenes, folder: Path) -> None:
    """Writes what `sinklens profile` looks at by default: pictures with question, answer and object mask.

    The text that is fed is the whole caption: it names the objects, so that tokens read what they speak of.
    """
    from PIL import Image

    masks = recipe.task.object_pixels(scenes)
    (folder / "pictures").mkdir(exist_ok=True)
    question, lines = " ".join(QUESTION), []
    for picture, pixels in enumerate(scenes.pixels):
        name, mask = f"pictures/{picture:02d}.png", f"pictures/{picture:02d}.mask.png"
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / name)
        Image.fromarray(masks[picture]).save(folder / mask)
        text = caption_text(recipe, scenes, picture)
        answer = text.removeprefix(question).strip()
        lines.append({"image": name, "text": text, "question": question, "answer": answer, "mask": mask})
    written = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "sinklens_pictures.jsonl").write_text(written, encoding="utf-8")


def caption_text(recipe: VisionRecipe, scenes: Scenes, picture: int) -> str:
    """Question and answer as text, without the special tokens."""
    return " ".join([*QUESTION, *recipe.task.caption(scenes, picture)[:-1]])


def _save_samples(scenes: Scenes, captions: list[str], folder: Path) -> None:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for picture, pixels in enumerate(scenes.pixels):
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(folder / f"{picture}.png")
    table = {f"{picture}.png": captions[picture] for picture in range(len(scenes))}
    (folder / "captions.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
