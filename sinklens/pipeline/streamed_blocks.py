"""Whether a model is read block by block, and what that is said to take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sinklens.core.errors import UsageError
from sinklens.models.spec import OpenedModel
from sinklens.models.streamable import refuse_unstreamable_source
from sinklens.models.streaming import BUDGET
from sinklens.models.streaming.opening import stored_tensors

from .cost import parse_size, size

if TYPE_CHECKING:
    from sinklens.inputs.spec import Prompt
    from sinklens.models.opening import ModelDescription

    from .options import ProfileOptions

MARGIN = 4
"""Models whose files are this many times smaller than the free memory are opened without further thought."""
AT_A_TIME = 2
"""Blocks in memory: the one that runs and the next one, which is read meanwhile."""


@dataclass(frozen=True)
class Choice:
    """Whether blocks are streamed, and why, in a few words."""

    on: bool
    why: str


@dataclass(frozen=True)
class StreamCost:
    """What streaming takes, in bytes.

    Attributes:
        shell: Everything outside the blocks, in memory throughout.
        block: The largest block; two are in memory at a time, in each process.
        scratch: What dequantising the largest parameter takes beside it; 0 for weights stored as they are used.
        states: The states of all prompts between two blocks, with what blocks hand on beside them.
        shown: About what all blocks show of all prompts, which is kept until the last block has run.
        budget: How many bytes of both each process may hold in memory.
        processes: Processes that go through the blocks in step, each with its share of the batches.
        one_memory: How many of them have the same memory.
        spilled: What is on disk beyond all budgets, while the run lasts.
    """

    why: str
    shell: int
    block: int
    states: int
    shown: int
    budget: int
    scratch: int = 0
    processes: int = 1
    one_memory: int = 1

    @property
    def weights(self) -> int:
        """In one memory, of all processes that have it."""
        return self.one_memory * (self.shell + AT_A_TIME * self.block + self.scratch)

    @property
    def held(self) -> int:
        """States and what was shown, in one memory."""
        each = min((self.states + self.shown) / self.processes, self.budget)
        return round(self.one_memory * each)

    @property
    def spilled(self) -> int:
        return max(0, self.states + self.shown - self.processes * self.budget)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "spilled": self.spilled}


def budget_of(options: ProfileOptions) -> int:
    return BUDGET if options.stream_budget is None else parse_size(options.stream_budget, "--stream-budget")


def choose(model: Any, options: ProfileOptions, one_memory: int = 1) -> Choice:
    """Whether to stream: as asked for, else where the model is predicted not to fit into memory.

    Args:
        one_memory: Processes that would hold it in the same memory each.

    Raises:
        SinklensError: As `refuse_streaming`, if it was asked for.
    """
    if options.stream == "off":
        return Choice(False, "switched off")
    if options.stream == "on":
        refuse_streaming(model, options)
        return Choice(True, "asked for")
    obstacle = obstacle_to_streaming(model, options)
    if obstacle is not None:
        return Choice(False, obstacle)
    lacking = lacks_library(_config(model, options), options)
    if lacking is not None:
        refuse_streaming(model, options)
        return Choice(True, lacking)
    if _small(model, options, one_memory):
        return Choice(False, "small")
    from .plan import predict

    predicted = predict(model, replace(options, stream="off"), one_memory=one_memory)[2]
    if predicted.fits is not False:
        return Choice(False, "fits into memory")
    return Choice(True, why_streamed(predicted.weights + predicted.working, predicted.available, one_memory))


def why_streamed(needed: int, free: int | None, one_memory: int = 1) -> str:
    """In a few words, why not all blocks are held."""
    each = f" in {one_memory} processes" if one_memory > 1 else ""
    return f"{size(needed)} are needed to hold all blocks{each}, {size(free)} are free"


def refuse_streaming(model: Any, options: ProfileOptions) -> None:
    """Refuse, before any weights are read, to stream a model that cannot be, as opening it streamed would.

    Raises:
        UsageError: Something that was asked for is in the way.
        ModelError: The model cannot be read block by block.
    """
    from sinklens.models.catalog import locate
    from sinklens.models.loading import parse_dtype
    from sinklens.models.quantised import check_dtype, packed_format

    obstacle = obstacle_to_streaming(model, options)
    if obstacle is not None:
        raise UsageError(f"--stream on was asked for, but {obstacle}.", hint="Leave it out.")
    source, config = locate(model, options.revision), _config(model, options)
    refuse_unstreamable_source(source, config)
    if packed_format(config) is None:
        return
    dtype = parse_dtype(options.dtype)
    check_dtype(source, config, dtype)
    if source.folder is not None:
        stored_tensors(source, config, dtype)


def _config(model: Any, options: ProfileOptions) -> Any:
    from sinklens.models.catalog import locate
    from sinklens.models.loading import load_config

    return load_config(locate(model, options.revision), options.trust_remote_code)


def lacks_library(config: Any, options: ProfileOptions) -> str | None:
    """Why packed weights are streamed where nobody asked: what transformers needs for them is not here."""
    from sinklens.models.quantised import lacking_library, packed_format

    lacking = lacking_library(config) if options.stream == "auto" else None
    return lacking and f"{packed_format(config)} needs {lacking} in memory, which is not installed"


def refuse_in_memory(options: ProfileOptions) -> None:
    """Refuse streaming where weights are changed, which must be in memory for that.

    Raises:
        UsageError: It was asked for.
    """
    if options.stream == "on":
        raise UsageError(
            "Only a profile can be streamed: mitigations and probes change weights or generate, which takes all blocks "
            "in memory.",
            hint="Leave out --stream; the model itself can be looked at with: sinklens profile --stream on",
        )


def obstacle_to_streaming(model: Any, options: ProfileOptions) -> str | None:
    """Why this model cannot be streamed at all, None if it can."""
    if isinstance(model, nn.Module | OpenedModel) or not (
        model is None or isinstance(model, str) or _path(model)
    ):
        return "the model is in memory already"
    if options.remote or options.backend not in (None, "hf"):
        return "another library runs the model"
    if options.device_map is not None:
        return "a device map decides where its weights are"
    if options.tensor_parallel:
        return "a tensor-parallel plan spreads each of its blocks"
    return None


def _path(model: Any) -> bool:
    from os import PathLike

    return isinstance(model, PathLike)


def _small(model: Any, options: ProfileOptions, one_memory: int) -> bool:
    """Whether the files are so small that nothing needs to be predicted."""
    from sinklens.models.opening import stored_bytes

    from .cost import available_memory

    free, stored = available_memory(device_of_run(options)), stored_bytes(model, options.revision)
    return free is None or (stored is not None and stored * MARGIN * one_memory < free)


def device_of_run(options: ProfileOptions) -> str | None:
    """Where the model will run: as asked for, else the first GPU; None for the CPU."""
    import torch

    return options.device or ("cuda" if torch.cuda.is_available() else None)


def sharing_memory(options: ProfileOptions, here: int) -> int:
    """How many of the processes on a machine have the same memory: all, or those that have the same accelerator.

    Args:
        here: Processes on the machine.
    """
    import torch

    if options.device not in (None, "cuda") or not torch.cuda.is_available():
        return here
    return -(-here // torch.cuda.device_count())


def stream_cost(
    described: ModelDescription,
    batches: Iterable[list[Prompt]],
    shown: int,
    why: str,
    budget: int,
    processes: int = 1,
    one_memory: int = 1,
) -> StreamCost:
    """The cost of streaming these batches, of which blocks show so many bytes."""
    tokens = sum(len(batch) * len(batch[0]) for batch in batches)
    states = round(tokens * described.handed_bytes)
    parts = described.shell_bytes, described.block_bytes, states, shown, budget, described.scratch_bytes
    return StreamCost(why, *parts, processes, one_memory)


def weights_section(opened: OpenedModel) -> dict[str, Any]:
    """For the manifest: how weights became what ran. Nothing for a model that is stored and held as it runs."""
    dequantised = {"from": opened.dequantised, "to": opened.info.dtype}
    return {**_streamed(opened), **({"dequantised": dequantised} if opened.dequantised else {})}


def _streamed(opened: OpenedModel) -> dict[str, Any]:
    blocks = opened.blocks
    if blocks is None:
        return {}
    stored = blocks.recipes.stored
    return {
        "stream": {
            "why": blocks.why,
            "blocks": len(blocks),
            "times_loaded": list(blocks.loads),
            "bytes_read": stored.total_read,
            "bytes_stored": sum(header.nbytes for _, header in stored.where.values()),
            "shell_bytes": blocks.sizes.shell,
            "block_bytes": blocks.sizes.block,
            "budget_bytes": blocks.budget,
        }
    }
