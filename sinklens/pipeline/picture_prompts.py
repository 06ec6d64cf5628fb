"""Whether a run looks at pictures, and reading them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sinklens.analyzers import chosen_analyzers
from sinklens.core.errors import DataError, UsageError
from sinklens.inputs.spec import PromptSet

from .options import ProfileOptions


def has_pictures(prompts: PromptSet) -> bool:
    return any(prompt.visual is not None for prompt in prompts.prompts)


def wants_pictures(options: ProfileOptions, own: str | None) -> bool:
    """Whether the prompts that were asked for, or else those that came with the checkpoint, have pictures."""
    from sinklens.inputs.vision import holds_pictures

    if options.images is not None:
        return True
    return holds_pictures(options.prompts if options.prompts is not None else own)


def read_pictures(
    options: ProfileOptions, own: str | None, config: Any, processor: Callable[[], Any]
) -> PromptSet:
    """The prompts with pictures of a run.

    Raises:
        UsageError: An option that has no meaning for pictures was given.
        SinklensError: They cannot be read, or the model reads none.
    """
    from sinklens.inputs.vision import load_pictures, require_vision

    if options.pack:
        raise UsageError("Prompts with pictures cannot be packed into windows.", hint="Leave --pack out.")
    require_vision(config)
    default = options.images is None and options.prompts is None
    prompts = load_pictures(
        options.images,
        processor(),
        config,
        prompts=own if default else options.prompts,
        question=options.question,
        n=options.n,
        seq_len=options.seq_len,
        bos=options.bos,
        chat_template=options.chat_template,
        seed=options.seed,
    )
    if default:
        prompts.description["source"] = "pictures that came with the checkpoint"
    return prompts


def refuse_without_pictures(asked: Any, prompts: PromptSet) -> None:
    """Refuse texts where an analyzer was named that reads pictures only; others say themselves that they do not apply.

    Raises:
        DataError: Before anything is run.
    """
    if has_pictures(prompts):
        return
    items = asked.split(",") if isinstance(asked, str) else asked
    named = [item for item in items if item not in ("all", "")]
    visual = [
        analyzer.name for analyzer in (chosen_analyzers(named) if named else ()) if analyzer.of_pictures
    ]
    if visual:
        raise DataError(
            f"{visual[0]} reads prompts with pictures; these are texts.",
            hint="Give pictures with --images PATH, or leave out what asks for them.",
        )


def refuse_unread_dims(asked: str | None, prompts: PromptSet) -> None:
    """Refuse sink dims for a profile of texts, where nothing reads them.

    Raises:
        UsageError: Before anything is run.
    """
    if asked is not None and not has_pictures(prompts):
        raise UsageError(
            "--sink-dims says in which dims sinks of prompts with pictures are large, and the prompts have none.",
            hint="Give pictures with --images PATH, or leave it out.",
        )
