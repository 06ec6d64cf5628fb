"""Tasks that come with the package: perplexity of a corpus, and what the bundled checkpoints were trained to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.suggest import did_you_mean
from sinklens.models.spec import OpenedModel

from ..items import Item
from .base import Task
from .captions import Captions
from .choice import Choice
from .files import checked_settings, task_from_file, task_from_hub
from .perplexity import Perplexity
from .yes_no import YesNo

SEED = 20_011
"""Of the bundled tasks' items; training and the measurements of the cards have other ones."""


@dataclass(frozen=True)
class Builtin:
    """A task with a name of its own.

    Attributes:
        models: Bundled checkpoints it is for; empty for every language model.
        make: From a model and the number of items.
        count: Items by default.
    """

    name: str
    about: str
    models: tuple[str, ...]
    make: Callable[[OpenedModel, int], Task]
    count: int


def perplexity(opened: OpenedModel, count: int) -> Task:
    """Held-out text of the model's own world for the bundled toys, else the bundled corpus."""
    own = toy_texts(opened, count)
    if own is not None:
        return Perplexity(name="perplexity", items=own)
    from sinklens.inputs.sources import read_source

    documents = read_source("corpus:mixed", n=None).documents
    items = tuple(
        Item(document.source, str(document.content), group=document.domain) for document in documents[:count]
    )
    return Perplexity(name="perplexity", items=items)


def toy_texts(opened: OpenedModel, count: int) -> tuple[Item, ...] | None:
    """New sequences of the language that a bundled toy speaks; None for other models."""
    if toy(opened) not in ("dense-ind", "moe-ind"):
        return None
    from sinklens.testbeds.data import InductionTask

    ids = InductionTask().sample(count, 64, np.random.default_rng(SEED))
    return tuple(Item(f"perplexity#{i}", tuple(map(int, row))) for i, row in enumerate(ids))


def induction(opened: OpenedModel, count: int) -> Task:
    """The last word of a sequence whose context decides it: after a trigger, or after a name seen before."""
    from sinklens.testbeds.data import InductionTask, QueryClass

    task = InductionTask()
    words = task.vocabulary
    choices = words[: task.ordinary]
    rng = np.random.default_rng(SEED + 1)
    ids = task.sample(4 * count, 64, rng)
    classes, known = task.classify(ids), task._known_successors(ids)
    items: list[Item] = []
    wanted = {QueryClass.TRIGGER: "copy after a trigger", QueryClass.KEY_SEEN: "recall after a name"}
    for row in range(len(ids)):
        kind = list(wanted)[len(items) % 2]
        # The last place of this class: with most context, and with a next word that the context decides.
        places = [
            t for t in range(16, 63)
            if classes[row, t] == kind
            and (kind == QueryClass.TRIGGER or known[row, t] == ids[row, t + 1])
            and ids[row, t + 1] < task.ordinary
        ]  # fmt: skip
        if places:
            place = places[-1]
            answer = int(ids[row, place + 1])
            items.append(
                Item(
                    f"induction#{len(items)}",
                    tuple(map(int, ids[row, : place + 1])),
                    choices,
                    answer,
                    group=wanted[kind],
                )
            )
        if len(items) == count:
            break
    return Choice(name="induction", items=tuple(items))


def shapes_yes_no(opened: OpenedModel, count: int) -> Task:
    """Is there a red bar? Answered by what the model says of the picture, since it can only describe."""
    from sinklens.testbeds.vision import COLOURS, SHAPES

    rng = np.random.default_rng(SEED + 2)
    colours = tuple(COLOURS)
    items = []
    for i, (visual, prompt, objects) in enumerate(_pictures(count, rng)):
        answer = i % 2
        present = objects[int(rng.integers(len(objects)))]
        colour, shape = present.split()
        if not answer and i % 4 == 0:  # the colour is there, in another shape
            shape = str(rng.choice([s for s in SHAPES if s != shape]))
        elif not answer:  # the colour is not there at all
            there = {name.split()[0] for name in objects}
            colour = str(rng.choice([c for c in colours if c not in there]))
        items.append(
            Item(f"shapes-yes-no#{i}", prompt, answer=answer, reference=f"{colour} {shape}", visual=visual)
        )
    return YesNo(name="shapes-yes-no", items=tuple(items), by="mention")


def shapes_captions(opened: OpenedModel, count: int) -> Task:
    """Descriptions of pictures with one to three coloured shapes."""
    from sinklens.testbeds.vision import COLOURS, SHAPES

    made = _pictures(count, np.random.default_rng(SEED + 3))
    items = tuple(
        Item(f"shapes-captions#{i}", prompt, objects=objects, visual=visual, group=str(len(objects)))
        for i, (visual, prompt, objects) in enumerate(made)
    )
    every = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    return Captions(name="shapes-captions", items=items, vocabulary=every, max_new_tokens=8)


def _pictures(count: int, rng: np.random.Generator) -> list[tuple[Any, tuple[int, ...], tuple[str, ...]]]:
    """Inputs, prompt and objects of new pictures of the shapes world."""
    from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid, Picture
    from sinklens.inputs.spec import Visual
    from sinklens.testbeds.vision import COLOURS, QUESTION, SHAPES, ShapesTask

    task = ShapesTask()
    scenes = task.sample(count, rng)
    encoded = task.encode(scenes)
    length = 1 + task.patches + len(QUESTION)
    kinds = np.array([Kind.SYSTEM] + [Kind.VISUAL] * task.patches + [Kind.QUESTION] * len(QUESTION))
    places = np.arange(task.patches).reshape(task.grid, task.grid) + task.image_slice.start
    colours = tuple(COLOURS)
    made = []
    for i in range(count):
        pixels = np.ascontiguousarray(scenes.pixels[i].transpose(1, 2, 0))
        picture = Picture(f"shapes-{i}.png", task.side, task.side, _hash(pixels))
        grid = PatchGrid(0, "whole", places, (0.0, 0.0, float(task.side), float(task.side)))
        spans = ModalitySpans(kinds, (picture,), (grid,))
        visual = Visual(spans, {"pixel_values": encoded.pixel_values[i : i + 1]}, (pixels,))
        objects = tuple(
            f"{colours[scenes.colours[i, k]]} {SHAPES[scenes.shapes[i, k]]}" for k in range(scenes.counts[i])
        )
        made.append((visual, tuple(encoded.input_ids[i, :length].tolist()), objects))
    return made


def _hash(pixels: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(pixels.tobytes()).hexdigest()


BUILTINS = {
    task.name: task
    for task in (
        Builtin("perplexity", "how well held-out text is predicted", (), perplexity, 200),
        Builtin(
            "induction",
            "the next word where the context decides it (copy after a trigger, recall after a name)",
            ("dense-ind", "moe-ind"),
            induction,
            400,
        ),
        Builtin(
            "shapes-yes-no",
            "is there a red bar? by what the model says of the picture",
            ("vlm-shapes",),
            shapes_yes_no,
            120,
        ),
        Builtin(
            "shapes-captions",
            "captions of pictures with known objects",
            ("vlm-shapes",),
            shapes_captions,
            120,
        ),
    )
}
SHORT = {"ppl": "perplexity"}
FORMS = "task:file.jsonl, hf:dataset[:config[:split]], lm-eval:task"


def toy(opened: OpenedModel) -> str:
    """Name of the bundled checkpoint that a model is, or "". Its weights may be loaded in another precision."""
    return opened.info.id.removeprefix("bundled:") if opened.info.id.startswith("bundled:") else ""


def tasks_for(opened: OpenedModel) -> tuple[str, ...]:
    """Names of the built-in tasks that fit a model, the ones made for it first."""
    fitting = [task for task in BUILTINS.values() if not task.models or toy(opened) in task.models]
    # A vision-language toy has no text of its own to predict.
    fitting = [task for task in fitting if toy(opened) != "vlm-shapes" or task.models]
    return tuple(task.name for task in sorted(fitting, key=lambda task: not task.models))


def read_task(spec: str, opened: OpenedModel, *, n: int | None = None) -> Task:
    """The task behind a name of the command line: `name[:setting=value...]` or one of the forms above.

    Raises:
        UsageError: There is no such task.
        ModelError: It is not for this model.
    """
    head, _, rest = spec.partition(":")
    if head == "task" or spec.lower().split(":")[0].endswith(".jsonl"):
        path, settings = _settings(rest if head == "task" else spec)
        return _first(task_from_file(path, **settings), n)
    if head == "hf":
        parts, settings = _settings(rest)
        return _first(task_from_hub(parts, **settings), n)
    if head == "lm-eval":
        from .harness import harness_task

        return harness_task(rest, limit=n)
    name = SHORT.get(head, head)
    if name not in BUILTINS:
        raise UsageError(
            f"Unknown task {head!r}.",
            detail=did_you_mean(head, [*BUILTINS, *SHORT]) or f"Also: {FORMS}.",
            hint="See: sinklens ls tasks",
        )
    builtin = BUILTINS[name]
    if builtin.models and toy(opened) not in builtin.models:
        raise ModelError(
            f"The task {name!r} is made for {' and '.join(f'bundled:{model}' for model in builtin.models)}.",
            hint=f"For {opened.info.id} there are: {', '.join(tasks_for(opened)) or 'none'}, and {FORMS}.",
        )
    made = builtin.make(opened, n or builtin.count)
    _, settings = _settings(rest)
    if not settings:
        return made
    return type(made)(
        name=made.name, items=made.items, **{**_own(made), **checked_settings(type(made), settings)}
    )


def _own(task: Task) -> dict[str, Any]:
    return {key: value for key, value in task.settings.items() if key != "name"}


def _first(task: Task, n: int | None) -> Task:
    if n is None or n >= len(task.items):
        return task
    from dataclasses import replace

    rng = np.random.default_rng(0)
    kept = sorted(rng.permutation(len(task.items))[:n])
    return replace(task, items=tuple(task.items[i] for i in kept))


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    """`file.jsonl:by=generation:window=64` as the file and its settings."""
    parts = text.split(":") if text else []
    plain = [part for part in parts if "=" not in part]
    settings = dict(part.split("=", 1) for part in parts if "=" in part)
    return ":".join(plain), {key.replace("-", "_"): _value(value) for key, value in settings.items()}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)
