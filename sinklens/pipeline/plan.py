"""`--dry-run`: what a run would do and cost, from the config and the files' headers. No weights are loaded."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sinklens.tracers import signals as sig
from sinklens.tracers.executor import TracePlan, partition
from sinklens.tracers.signals import PLACED, Signal, Source

from .options import ProfileOptions
from .prepare import analyzers_for, plan_for, read_prompts

if TYPE_CHECKING:
    from sinklens.inputs.spec import PromptSet
    from sinklens.models.opening import ModelDescription

BYTES = 4


@dataclass(frozen=True)
class Prediction:
    """Predicted cost. Bytes are sums over known tensors; seconds come from one measured matrix product.

    Attributes:
        weights: Memory for the weights at the dtype asked for.
        working: Activations of the largest batch and the statistics in flight.
        disk: Size of the run folder's arrays.
        seconds: A rough estimate for this machine's CPU, None for models that will run elsewhere.
    """

    weights: int
    working: int
    available: int | None
    disk: int
    seconds: float | None
    batches: int
    signals: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.weights + self.working <= self.available


def predict(model: str | None, options: ProfileOptions) -> tuple[ModelDescription, PromptSet, Prediction]:
    """Plan a run of a model by name, without loading its weights."""
    from sinklens.models.catalog import locate
    from sinklens.models.loading import load_config, load_tokenizer
    from sinklens.models.opening import PROMPTS, describe_model

    analyzers = analyzers_for(options)
    described = describe_model(
        model, revision=options.revision, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    source = locate(model, options.revision)
    tokenizer = load_tokenizer(source, None, True, options.trust_remote_code)
    own = source.folder / PROMPTS if source.folder is not None else None
    config = load_config(source, options.trust_remote_code)
    prompts = read_prompts(options, tokenizer, str(own) if own and own.is_file() else None, config)
    plan = plan_for(options, analyzers)
    return described, prompts, prediction(described, prompts, plan, on_cpu=options.device in (None, "cpu"))


def prediction(
    described: ModelDescription, prompts: PromptSet, plan: TracePlan, *, on_cpu: bool
) -> Prediction:
    """The cost of tracing these prompts with this plan."""
    tower = described.anatomy.main
    batches = partition(prompts.prompts, most=plan.batch_prompts, tokens=plan.batch_tokens)
    widest = max(len(batch) * len(batch[0]) for batch in batches)
    tokens = sum(len(batch) * len(batch[0]) for batch in batches)
    return Prediction(
        weights=described.loaded_bytes,
        working=working_bytes(described, widest, plan),
        available=available_memory(),
        disk=sum(record_bytes(described, len(prompt), plan) for prompt in prompts.prompts),
        seconds=_seconds(described, tokens) if on_cpu else None,
        batches=len(batches),
        signals=tuple(
            sorted(s.name for s in plan.signals if tower.n_experts or s.source is not Source.EXPERTS)
        ),
    )


def record_bytes(described: ModelDescription, length: int, plan: TracePlan) -> int:
    """Size of one prompt's record on disk."""
    tower = described.anatomy.main
    sizes = {
        "layer": len(tower.blocks),
        "head": tower.heads,
        "kv_head": tower.kv_heads,
        "pos": length,
        "kept": min(length, plan.limits.leading + plan.limits.strongest),
        "rank": plan.limits.ranks,
        "expert": tower.n_experts,
        "slot": tower.top_k,
        "bin": sig.FIRST_MASS_BINS,
    }
    return sum(_elements(signal, sizes) * BYTES * (3 if signal in PLACED else 1) for signal in plan.signals)


def working_bytes(described: ModelDescription, tokens: int, plan: TracePlan) -> int:
    """Peak beyond the weights for a batch of `tokens`: hidden states, the widest MLP, statistics, scores."""
    tower = described.anatomy.main
    # About six states of the residual width are alive in a block, and two of four times that width in its MLP.
    hidden = tokens * tower.hidden_size * BYTES * (6 + 2 * 4)
    per_key = tokens * tower.heads * len(tower.blocks) * BYTES * 3
    return hidden + per_key + plan.blocks.scores * BYTES * 4


def available_memory() -> int | None:
    """Free memory of this machine in bytes, None where the system does not tell it."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _elements(signal: Signal, sizes: dict[str, int]) -> int:
    count = 1
    for axis in signal.axes:
        count *= sizes[axis]
    return count


def _seconds(described: ModelDescription, tokens: int) -> float:
    """Two operations per active weight and token, at the speed of one matrix product measured now."""
    import torch

    tower, info = described.anatomy.main, described.info
    active = float(info.parameters)
    if tower.n_experts:
        # Nearly all weights of a mixture are in its experts.
        active *= min(1.0, 1.5 * tower.top_k / tower.n_experts)
    a = torch.randn(512, 512)
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.05:
        torch.mm(a, a)
        products += 1
    speed = products * 2 * 512**3 / (time.perf_counter() - start)
    return 2 * active * tokens / speed


def plan_document(described: ModelDescription, prompts: PromptSet, predicted: Prediction) -> dict[str, Any]:
    """The plan as one JSON document."""
    from sinklens.core.canonical import plain

    document = {
        "schema": "sinklens/plan/1",
        "model": asdict(described.info),
        "inputs": prompts.description,
        "prediction": {**asdict(predicted), "fits": predicted.fits, "weights_estimated": described.estimated},
    }
    found = plain(document)
    assert isinstance(found, dict)
    return found
