"""Questions with pictures as their users gave them, through the model's own processor."""

from __future__ import annotations

from sinklens.core.errors import ModelError
from sinklens.models.spec import OpenedModel

from .items import Item
from .running import Question


def question_with_picture(opened: OpenedModel, item: Item, *, chat_template: bool) -> Question:
    """The tokens and pictures of one question.

    Raises:
        ModelError: The model came without a processor, or cannot read pictures.
    """
    from sinklens.inputs.vision import load_pictures

    processor = getattr(opened, "processor", None)
    if processor is None:
        raise ModelError(
            f"{item.id} has a picture, but the model came without a processor.",
            hint="Open a vision-language model by name or folder, so that its processor is found.",
        )
    row = {"image": item.image, "text": item.prompt}
    prompts = load_pictures([row], processor, opened.module.config, chat_template=chat_template).prompts
    return Question(prompts[0].token_ids, visual=prompts[0].visual)
