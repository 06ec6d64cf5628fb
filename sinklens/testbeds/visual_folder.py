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
    """A folder that opens like any checkpoint: processor, pictures, prompts, `truth.json`, and the questions twice.

    `task.jsonl` has them as a choice task, `answers.jsonl` as texts that end in their answers.

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
    """Pictures and the questions about them; the first, with masks of their objects, are what a profile looks at."""
    from PIL import Image

    asked = task.ask(QUESTIONS, np.random.default_rng(seed))
    masks = task.object_pixels(asked.scenes)
    questions = task.questions(asked)
    (out / "pictures").mkdir(exist_ok=True)
    answered = []
    for place, (pixels, question) in enumerate(zip(asked.scenes.pixels, questions, strict=True)):
        question["image"] = f"pictures/{place:03d}.png"
        Image.fromarray(pixels.transpose(1, 2, 0).copy()).save(out / question["image"])
        answer = question["choices"][question["answer"]]
        text = f"{question['prompt']} {answer}"
        row = {"image": question["image"], "text": text, "question": question["prompt"], "answer": answer}
        if place < PICTURES:
            row["mask"] = f"pictures/{place:03d}.mask.png"
            Image.fromarray(masks[place]).save(out / row["mask"])
        answered.append(row)
    _write(out / "task.jsonl", questions)
    _write(out / "answers.jsonl", answered)
    _write(out / "sinklens_pictures.jsonl", answered[:PICTURES])
    return questions


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
