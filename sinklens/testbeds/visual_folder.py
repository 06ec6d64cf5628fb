"""Saves the planted model that answers questions about pictures, with its pictures, questions and answer key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .planting.retrieve_visual import VisualRetrievalTruth, plant_visual_retrieval, retrieval_recipe
from .vision_train import PICTURES, build_processor, require_pillow
from .visual_retrieval import VisualRetrievalTask

QUESTIONS = 192


def save_visual_retrieval(out: Path, seed: int, options: dict[str, float]) -> VisualRetrievalTruth:
    """A folder that opens like any checkpoint: processor, `task.jsonl`, pictures, prompts and `truth.json`.

    Raises:
        UsageError: Pillow is not installed, or the logits leave nothing to win.
    """
    require_pillow()
    task = VisualRetrievalTask()
    model, truth = plant_visual_retrieval(seed=seed, task=task, **options)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    build_processor(retrieval_recipe(task)).save_pretrained(out)
    questions = _save_questions(task, out, seed)
    texts = [{"text": question["prompt"]} for question in questions[:64]]
    _write(out / "sinklens_prompts.jsonl", texts)
    (out / "truth.json").write_text(json.dumps(truth.to_json(), indent=1) + "\n", encoding="utf-8")
    return truth


def _save_questions(task: VisualRetrievalTask, out: Path, seed: int) -> list[dict[str, Any]]:
    """Pictures, the choice task that asks about each, and what a profile looks at: the first with their answers."""
    from PIL import Image

    asked = task.ask(QUESTIONS, np.random.default_rng(seed))
    masks = task.object_pixels(asked.scenes)
    questions = task.questions(asked)
    (out / "pictures").mkdir(exist_ok=True)
    shown = []
    for place, (pixels, question) in enumerate(zip(asked.scenes.pixels, questions, strict=True)):
        question["image"] = f"pictures/{place:03d}.png"
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(out / question["image"])
        if place < PICTURES:
            mask, answer = f"pictures/{place:03d}.mask.png", question["choices"][question["answer"]]
            Image.fromarray(masks[place]).save(out / mask)
            text = f"{question['prompt']} {answer}"
            row = {"image": question["image"], "text": text, "question": question["prompt"]}
            shown.append({**row, "answer": answer, "mask": mask})
    _write(out / "task.jsonl", questions)
    _write(out / "sinklens_pictures.jsonl", shown)
    return questions


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
