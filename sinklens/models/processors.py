"""The processor that came with a model: what turns pictures and text into the model's inputs."""

from __future__ import annotations

from functools import cache
from typing import Any

from sinklens.core.errors import ModelError, SinklensError

from .catalog import Source
from .spec import OpenedModel

NEEDS = {"PIL": "pillow", "torchvision": "torchvision"}
"""What processors import, and the package that has it."""
INSTALL = "pip install 'sinklens[vision]'"


def load_processor(source: Source, trust_remote_code: bool) -> Any:
    """The processor beside a checkpoint.

    Raises:
        ModelError: It has none that reads pictures, or a package that it needs is missing.
    """
    from transformers import AutoProcessor

    require_pillow()
    options = {"revision": source.revision} if source.revision is not None else {}
    try:
        return _pictures_only(source.location, options) or AutoProcessor.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **options
        )
    except SinklensError:
        raise
    except Exception as error:
        raise _explained(error, source.id) from error


def processor_of(opened: OpenedModel) -> Any:
    """What reads pictures for a model: the processor that was given with it, else the one beside its checkpoint.

    Raises:
        ModelError: There is none, or it cannot be loaded.
    """
    require_pillow()
    if opened.processor is None and opened.load_processor is not None:
        opened.processor = opened.load_processor()
    if opened.processor is None:
        raise ModelError(
            "The prompts have pictures, but the model came without a processor.",
            detail="A model in memory does not know how its pictures were made into inputs.",
            hint="Give it: sl.profile(model, images=..., processor=AutoProcessor.from_pretrained(...))",
        )
    return check_processor(opened.processor, opened.info.id)


def require_pillow() -> None:
    """Refuse to go on without the library that reads pictures.

    Raises:
        ModelError: Pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise ModelError("Reading pictures needs Pillow, which is not installed.", hint=INSTALL) from None


def check_processor(processor: Any, name: str) -> Any:
    """`processor` if it reads both pictures and text.

    Raises:
        ModelError: It lacks one of the two.
    """
    missing = [part for part in ("image_processor", "tokenizer") if getattr(processor, part, None) is None]
    if missing:
        raise ModelError(
            f"The processor of {name!r}, {type(processor).__name__}, has no {' and no '.join(missing)}.",
            detail="Pictures need a processor that turns pictures and text into the model's inputs.",
            hint="Give one in Python: sl.profile(model, images=..., processor=AutoProcessor.from_pretrained(...))",
        )
    return processor


def _pictures_only(location: str, options: dict[str, Any]) -> Any:
    """The processor without its part for videos, which would need torchvision; None if it has no such part."""
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

    settings, rest = ProcessorMixin.get_processor_dict(location, **options)
    name = settings.get("processor_class") or _named_beside(location, options)
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if cls is None or "video_processor" not in cls.get_attributes():
        return None
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(location, **options),
        "tokenizer": AutoTokenizer.from_pretrained(location, **options),
    }
    arguments = [parts.get(part) for part in cls.get_attributes()]
    return without_videos(cls).from_args_and_dict(arguments, settings, **rest)


def _named_beside(location: str, options: dict[str, Any]) -> str | None:
    """The class that older checkpoints name beside their image processor's or tokenizer's settings."""
    from transformers import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(location, **options)
    except OSError:
        return None
    return settings.get("processor_class")


@cache
def without_videos(cls: type) -> Any:
    """`cls` made so that its video processor may be None.

    sinklens reads no videos, and transformers' video processors need torchvision, which pictures do not.
    """

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor" and argument is None:
            return type(None)
        return cls.check_argument_for_proper_class(self, argument_name, argument)  # pyright: ignore

    return type(
        cls.__name__, (cls,), {"check_argument_for_proper_class": check, "__module__": cls.__module__}
    )


def _explained(error: Exception, name: str) -> ModelError:
    """One message per cause: a package is missing, or the checkpoint has no processor for pictures."""
    said = " ".join(str(error).split())
    for module, package in NEEDS.items():
        if module.lower() in said.lower() and ("library" in said or "install" in said or "No module" in said):
            return ModelError(
                f"The processor of {name!r} needs {package}, which is not installed.",
                detail=said[:200],
                hint=INSTALL,
            )
    return ModelError(
        f"{name!r} has no processor that can be loaded: {said[:200]}",
        detail="Pictures need the processor that belongs to the model: processor_config.json or "
        "preprocessor_config.json beside its config.",
        hint="Copy it from the model this one was made from, or give processor=... in Python.",
    )
