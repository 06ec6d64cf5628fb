"""Questions with pictures as their users gave them, through the model's own processor."""

from __future__ import annotations

from typing import Any

from sinklens.core.errors import ModelError
from sinklens.models.processors import processor_of
from sinklens.models.spec import OpenedModel

from .items import Item
from .running import Question


def task_processor(opened: OpenedModel) -> Any:
    """What reads the pictures of a task: the processor given with the model, else the one beside its checkpoint.

    Raises:
        ModelError: There is none that reads pictures.
    """
    try:
        return processor_of(opened)
    except ModelError as error:
        raise ModelError(
            "The task has pictures, and no processor was found for them.", detail=error.what, hint=error.hint
        ) from error


def question_with_picture(
    opened: OpenedModel, processor: Any, item: Item, *, chat_template: bool
) -> Question:
    """The tokens and pictures of one question.

    Raises:
        DataError: The picture cannot be read.
        ModelError: The model reads no pictures.
    """
    from sinklens.inputs.vision import load_pictures

    module: Any = opened.module
    row = {"image": item.image, "text": item.prompt}
    (prompt,) = load_pictures([row], processor, module.config, chat_template=chat_template).prompts
    return Question(prompt.token_ids, visual=prompt.visual)
