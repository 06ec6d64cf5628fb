"""What a profile run is asked to do, as data that goes into the manifest and comes back on resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike, fspath
from typing import Any

from sinklens.core.errors import UsageError
from sinklens.core.suggest import did_you_mean
from sinklens.inputs.encode import Bos

from .cost import parse_size


@dataclass(frozen=True)
class ProfileOptions:
    """Everything but the model.

    Attributes:
        prompts: `corpus:NAME`, a `.txt` or `.jsonl` file (with `:field`), `hf:dataset`, or a list of strings; None
            takes the prompts that came with the checkpoint, else the bundled corpus.
        images: Pictures: a file, a folder, a JSONL file, or pictures in memory (see `load_pictures`).
        question: Asked about every picture that comes without one.
        n: Number of prompts; None takes the default of the source.
        seq_len: Prompts are cut to this many tokens.
        bos: `auto` (as the tokenizer does), `on` or `off`.
        mode: `faithful` or `fused`, see `sinklens.tracers.attention`.
        sample_queries: Estimate attention statistics, with standard errors, from this many query rows of each prompt
            (`512`) or this share of them (`0.1`, `10%`); None looks at every row.
        verify: Look again at a few prompts with the causes removed that were found. None does so if the main pass
            predicts that it takes under about a minute.
        backend: The library that runs the model, see `sinklens ls backends`. None takes the one whose object the
            model is, else transformers.
        remote: Run on NDIF through nnsight; nothing is loaded here.
        sensitivity: Take the same measurement with and without BOS and chat template, on random and repeated tokens,
            at several lengths and in several dtypes.
        sink_dims: Dims of the hidden state in which sinks of prompts with pictures are large: `published`,
            `third-party` or `1415,2533`; None searches for them.
        keep_positions: Strongest positions kept per head and prompt, besides the first 16.
        stream: Read the model's blocks from disk one at a time: `on`, `off`, or `auto` for models that do not fit into
            memory.
        stream_budget: Memory for the states of all prompts between two blocks, as `2GB`; more is kept on disk.
        tensor_parallel: Spread each layer over the processes of torchrun, by the model's tensor-parallel plan.
    """

    prompts: str | Sequence[Any] | None = None
    images: Any = None
    question: str | None = None
    n: int | None = None
    seq_len: int | None = None
    bos: Bos = "auto"
    chat_template: bool = False
    pack: bool = False
    seed: int = 0
    analyzers: tuple[Any, ...] = ()
    mode: str = "faithful"
    batch_size: int | None = None
    keep_positions: int = 48
    sink_dims: str | None = None
    sample_queries: str | float | None = None
    verify: bool | None = None
    sensitivity: bool = False
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    stream: str = "auto"
    stream_budget: str | int | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    backend: str | None = None
    remote: bool = False
    tensor_parallel: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("faithful", "fused"):
            raise UsageError(f"Unknown mode {self.mode!r}.", detail="It is faithful or fused.")
        if self.sample_queries is not None:
            from sinklens.tracers.sampling import Sampling  # which imports torch

            Sampling.parse(self.sample_queries)
            if self.mode == "fused":
                raise UsageError(
                    "--sample-queries saves nothing with --mode fused: one pass goes over every query row anyway."
                )
        if self.stream not in ("auto", "on", "off"):
            raise UsageError(f"Unknown stream {self.stream!r}.", detail="It is auto, on or off.")
        if self.stream_budget is not None:
            parse_size(self.stream_budget, "--stream-budget")
        if self.images is not None and self.prompts is not None:
            raise UsageError(
                "Give --images or --prompts, not both.",
                detail="Prompts with pictures of their own are a JSONL file for either.",
            )
        if self.bos not in ("auto", "on", "off"):
            raise UsageError(f"Unknown BOS policy {self.bos!r}.", detail="It is auto, on or off.")
        for name in ("n", "seq_len", "batch_size", "keep_positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")

    def request(self) -> dict[str, Any]:
        """As JSON for the manifest. Prompts and pictures given as objects are named, not repeated."""
        request = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.images is not None and not isinstance(self.images, str | PathLike):
            count = len(self.images) if isinstance(self.images, list | tuple) else 1
            request["images"] = None
            request["prompts_given"] = f"{count} {'picture' if count == 1 else 'pictures'} from memory"
        elif self.images is not None:
            request["images"] = fspath(self.images)
        if self.prompts is not None and not isinstance(self.prompts, str):
            request["prompts"] = None
            request["prompts_given"] = f"{len(self.prompts)} prompts from memory"
        request["analyzers"] = [item if isinstance(item, str) else repr(item) for item in self.analyzers]
        return request


# A protocol that a paper fixes, as overrides of the defaults. A flag that the user gives wins over its preset.
PRESETS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gu2024": (
        "sink rates at 64 tokens over 100 prompts, epsilon 0.3 (2410.10781)",
        {"n": 100, "seq_len": 64, "analyzers": ("primary-sinks",)},
    ),
    "sun2024": (
        "massive activations over 10 prompts of 4096 tokens without BOS (2402.17762, official code)",
        {"n": 10, "seq_len": 4096, "bos": "off", "pack": True, "analyzers": ("massive-activations",)},
    ),
    "su2025": (
        "Super Experts over 100 prompts of 2048 tokens (2507.23279)",
        {"n": 100, "seq_len": 2048, "pack": True, "analyzers": ("super-experts", "massive-activations")},
    ),
}


def with_preset(options: ProfileOptions, name: str, given: set[str]) -> ProfileOptions:
    """Options with a preset's values, except those the user gave."""
    if name not in PRESETS:
        raise UsageError(
            f"Unknown preset {name!r}.", detail=did_you_mean(name, PRESETS), hint="See: sinklens ls presets"
        )
    overrides = {key: value for key, value in PRESETS[name][1].items() if key not in given}
    return replace(options, preset=name, **overrides)
