"""What went wrong while a model was opened, in words a user can act on."""

from __future__ import annotations

from collections.abc import Iterator

from sinklens.core.errors import ModelError, OutOfMemory, SinklensError

from .catalog import Source

UNPACKED = (
    "--stream on (profile) dequantises the stored weights as they are read, and needs no library for it."
)


def explain(error: BaseException, source: Source, part: str, packed: str | None = None) -> SinklensError:
    """The error to raise instead of `error`, which transformers or the hub raised while reading `part`.

    Args:
        part: `config`, `weights` or `tokenizer`.
        packed: The format of the weights, if streaming needs no library for it.
    """
    chain = list(_chain(error))
    known = _hub(chain, source, part) or _memory(chain, source) or _library(chain, source, packed)
    if packed is not None and known is None:
        return ModelError(
            f"The {part} of {source.id!r} ({packed}) cannot be used in memory: {_in_a_line(error)}",
            detail=f"transformers raised {type(error).__name__}.",
            hint=UNPACKED,
        )
    return known or ModelError(
        f"The {part} of {source.id!r} cannot be used: {_in_a_line(error)}",
        detail=f"transformers raised {type(error).__name__}.",
        hint="If the files came from elsewhere, copy or download them again.",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _in_a_line(error: BaseException) -> str:
    """The message on one line of at most 200 characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:199]}…"


def _hub(chain: list[BaseException], source: Source, part: str) -> ModelError | None:
    """Answers of the hub, or their absence. More specific classes come first: gated is a kind of not found."""
    from huggingface_hub import errors

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    name = source.id
    if source.folder is not None:
        return None
    if met(errors.GatedRepoError):
        return ModelError(
            f"{name!r} is gated: its owner asks for an agreement first.",
            hint=f"Accept it at https://huggingface.co/{name}, then log in (hf auth login) or set HF_TOKEN.",
        )
    if met(errors.RevisionNotFoundError):
        return ModelError(
            f"{name!r} has no revision {source.revision!r}.",
            hint=f"See the branches and commits at https://huggingface.co/{name}/tree/main",
        )
    if met(errors.RepositoryNotFoundError):
        return ModelError(
            f"There is no model {name!r} on the hub, or it is private.",
            hint="Check the name (sinklens ls models). Private repository: log in (hf auth login) or set HF_TOKEN.",
        )
    if met(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        offline = met(errors.OfflineModeIsEnabled) or _is_offline()
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return ModelError(
            f"The {part} of {name!r} is not on this machine, and {why}.",
            detail=f"Revision: {source.revision or 'main'}." if source.revision else None,
            hint=f"With a network: hf download {name}. Offline, use a folder or sinklens profile without --model.",
        )
    if met(errors.EntryNotFoundError):
        return ModelError(
            f"{name!r} lacks the files of its {part}.",
            hint="It may hold a GGUF file or an adapter: use the one with config.json and *.safetensors.",
        )
    return None


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _memory(chain: list[BaseException], source: Source) -> OutOfMemory | None:
    import torch

    full = any(
        isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)
        for error in chain
    )
    if not full:
        return None
    return OutOfMemory(
        f"There is not enough memory to load {source.id!r}.",
        hint="--dry-run predicts the memory. Try: --dtype bf16, or --device-map auto, or a smaller model",
    )


def _library(chain: list[BaseException], source: Source, packed: str | None) -> ModelError | None:
    missing = next((error for error in chain if isinstance(error, ImportError)), None)
    if missing is None:
        return None
    where = "" if packed is None else " to be held in memory"
    return ModelError(
        f"{source.id!r} needs a library that is not installed{where}: {_in_a_line(missing)}",
        hint="Install it in this environment, or use an unquantised version of the model."
        if packed is None
        else UNPACKED,
    )
