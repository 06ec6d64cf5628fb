"""Which models can be read block by block: told from config and options, before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinklens.core.errors import ModelError, UsageError

from .catalog import Source
from .checkpoint import weight_files
from .packed import PACKED
from .quantised import FORMATS, LIBRARIES, format_of, settings_of


def refuse_unstreamable(device_map: Any, quantization: Any) -> None:
    """Refuse what decides differently where weights are, or what they are."""
    if device_map is not None:
        raise UsageError(
            "A streamed model runs on one device, so a device map has no place.",
            hint="Give --device, or leave --stream off.",
        )
    if quantization is not None:
        raise UsageError("A streamed model is not quantised while it is loaded.", hint="Use --stream off.")


def refuse_unstreamable_source(source: Source, config: Any) -> None:
    """Refuse models whose blocks cannot be read and run one at a time, by the config and the names of their files.

    Raises:
        ModelError: The weights are in a format that is not undone block by block, or in files that are only read
            whole.
    """
    refuse_unstreamable_format(source, config)
    for path in () if source.folder is None else weight_files(source.folder, source.id):
        refuse_pickle(path, source.id)


def refuse_unstreamable_format(source: Source, config: Any) -> None:
    """Refuse formats that are not undone block by block, and settings that are not known.

    Raises:
        ModelError: The format or setting is named, and what can be done.
    """
    method = format_of(config)
    if method is None or method in FORMATS:
        return
    if method in PACKED:
        settings_of(config, source.id)
        return
    library = LIBRARIES.get(method)
    needs = f" (in memory; transformers needs: pip install {library})" if library else ""
    raise ModelError(
        f"{source.id!r} is quantised ({method}), which cannot be streamed block by block.",
        detail=f"Dequantised while they are read: {', '.join((*FORMATS, *PACKED))}.",
        hint=f"Use --stream off{needs}, or stream the unquantised checkpoint.",
    )


def shares_more(family: str, index: int) -> ModelError:
    """The refusal of a model whose block `index` is the first that needs more than what is carried to it."""
    return ModelError(
        f"{family} cannot be streamed: its blocks pass on more than can be carried from one to the next.",
        detail=f"Block {index} does not do what it does in an ordinary pass when it is run on its own.",
        hint="Use --stream off, on a machine whose memory holds it.",
    )


def refuse_pickle(path: Path, name: str) -> None:
    """Refuse a weight file that is only read whole.

    Raises:
        ModelError: It is no safetensors file.
    """
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{name!r} keeps its weights in {path.name}, which cannot be read block by block.",
            hint="Save it as safetensors (save_pretrained of transformers), or use --stream off.",
        )
