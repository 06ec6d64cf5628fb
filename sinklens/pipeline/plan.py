"""`--dry-run`: what a run would do and cost, from the config and the files' headers. No weights are loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sinklens.tracers.executor import TracePlan, partition
from sinklens.tracers.signals import Signal, Source
from sinklens.tracers.signals_pictures import OF_QUERIES
from sinklens.tracers.signals_visual import PHI

from . import visual_experiments as visual
from .beside_plan import refuse_beside_plan, refuse_one_process
from .cost import available_memory
from .estimates import picture_bytes, record_bytes, seconds_for, shown_bytes, working_bytes
from .options import ProfileOptions
from .picture_prompts import has_pictures, refuse_without_pictures
from .prepare import (
    EFFECTS,
    READERS,
    SENSITIVITY,
    analyzers_for,
    plan_for,
    read_prompts,
    reading,
    those_that_apply,
)
from .query_blocks import described_blocks
from .streamed_blocks import (
    StreamCost,
    budget_of,
    device_of_run,
    lacks_library,
    obstacle_to_streaming,
    refuse_streaming,
    stream_cost,
    why_streamed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sinklens.analyzers import Analyzer
    from sinklens.inputs.spec import PromptSet
    from sinklens.models.opening import ModelDescription

VERIFY_PASSES = 30
"""Passes of a verification, about: what is found is not known before, and every cause has two or three controls."""


@dataclass(frozen=True)
class Prediction:
    """Predicted cost. Bytes are sums over known tensors; seconds come from one measured matrix product.

    Attributes:
        weights: Memory for the weights at the dtype asked for.
        working: Activations of the largest batch and the statistics in flight.
        disk: Size of the run folder's arrays.
        seconds: A rough estimate for this machine's CPU, None for models that will run elsewhere.
        experiments: Per experiment that is asked for or may run: `passes` and `tokens` in all, about, and `seconds`.
        stream: What streaming takes; None where all blocks are in memory. `weights` and `working` count it.
        query_blocks: Logits in flight, and query rows per block for the longest prompt.
        sampling: What is estimated from a sample of the query rows; None where all are looked at.
        spread: `processes` that hold the model together, and `weights_each`, about; None where one holds it all.
        together: `processes` that share the batches, and those of them that have `one_memory`, for which `weights` and
            `working` are; None for one process.
    """

    weights: int
    working: int
    available: int | None
    disk: int
    seconds: float | None
    batches: int
    signals: tuple[str, ...]
    experiments: dict[str, dict[str, Any]]
    stream: StreamCost | None = None
    query_blocks: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] | None = None
    spread: dict[str, int] | None = None
    together: dict[str, int] | None = None

    @property
    def fits(self) -> bool | None:
        return None if self.available is None else self.weights + self.working <= self.available


def predict(
    model: str | None, options: ProfileOptions, processes: int = 1, one_memory: int = 1
) -> tuple[ModelDescription, PromptSet, Prediction]:
    """Plan a run of a model by name, without loading its weights.

    Args:
        processes: How many torchrun started.
        one_memory: How many of them have the same memory.
    """
    from sinklens.models.catalog import locate
    from sinklens.models.loading import load_config, load_tokenizer
    from sinklens.models.opening import describe_model, own_prompts
    from sinklens.models.processors import load_processor

    spread = planned_spread(options, processes)
    analyzers = analyzers_for(options)
    if options.stream == "on":
        refuse_streaming(model, options)
    described = describe_model(
        model,
        revision=options.revision,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        spread=spread,
    )
    source = locate(model, options.revision)
    tokenizer = load_tokenizer(source, None, True, options.trust_remote_code)
    config = load_config(source, options.trust_remote_code)
    prompts = read_prompts(
        options,
        tokenizer,
        own_prompts(source),
        config,
        lambda: load_processor(source, options.trust_remote_code),
    )
    refuse_without_pictures(options.analyzers, prompts)
    analyzers = those_that_apply(options, analyzers, prompts)
    plan = reading(plan_for(options, analyzers), options, prompts)
    on_cpu = options.device in (None, "cpu")
    found = prediction(described, prompts, plan, on_cpu=on_cpu, device=device_of_run(options))
    if spread is not None:
        return described, prompts, spread_over(found, spread, device_of_run(options) is None)
    found = beside_others(found, max(processes, one_memory), one_memory)
    lacking = lacks_library(config, options)
    too_large = options.stream == "auto" and (found.fits is False or lacking is not None)
    if options.stream == "on" or (too_large and obstacle_to_streaming(model, options) is None):
        found = _streamed(model, options, described, prompts, plan, found, lacking)
        described = replace(described, dequantised=described.dequantised or described.packed)
    asked = experiments_of(options, analyzers, prompts, described.info.layers)
    for cost in asked.values():
        cost["seconds"] = seconds_for(described, cost["tokens"]) if on_cpu else None
    return described, prompts, replace(found, experiments=asked)


def _streamed(
    model: str | None,
    options: ProfileOptions,
    described: ModelDescription,
    prompts: PromptSet,
    plan: TracePlan,
    found: Prediction,
    lacking: str | None,
) -> Prediction:
    """The prediction with blocks streamed.

    Args:
        lacking: As `lacks_library`.

    Raises:
        SinklensError: As the run itself would, of a model that cannot be streamed.
    """
    refuse_streaming(model, options)
    together = found.together or {"processes": 1, "one_memory": 1}
    needed, free = found.weights + found.working, found.available
    why = lacking or why_streamed(needed, free, together["one_memory"])
    why = "asked for" if options.stream == "on" else why
    batches = partition(prompts.prompts, most=plan.batch_prompts, tokens=plan.batch_tokens)
    shown = sum(shown_bytes(described, prompt, plan) for prompt in prompts.prompts)
    cost = stream_cost(described, batches, shown, why, budget_of(options), **together)
    return replace(found, weights=cost.weights, working=found.working + cost.held, stream=cost)


def beside_others(found: Prediction, processes: int, one_memory: int) -> Prediction:
    """The cost of processes that have the same memory, each with a whole model and a batch of its own."""
    if processes == 1:
        return found
    together = {"processes": processes, "one_memory": one_memory}
    weights, working = one_memory * found.weights, one_memory * found.working
    return replace(found, weights=weights, working=working, together=together)


def planned_spread(options: ProfileOptions, processes: int) -> int | None:
    """The number of processes that are to hold the model together; None where each holds it all.

    Raises:
        UsageError: As the run would.
    """
    if not options.tensor_parallel:
        return None
    refuse_one_process(options, None if processes == 1 else processes)
    refuse_beside_plan(options)
    return processes


def spread_over(found: Prediction, processes: int, on_cpu: bool) -> Prediction:
    """The cost for one device, or for all processes where they share this machine's memory.

    Nearly all weights are in the projections that a plan cuts; norms are held by every process.
    """
    each = found.weights // processes
    spread = {"processes": processes, "weights_each": each}
    if on_cpu:
        return replace(found, working=found.working * processes, spread=spread)
    return replace(found, weights=each, spread=spread)


def experiments_of(
    options: ProfileOptions, analyzers: Sequence[Analyzer], prompts: PromptSet, layers: int
) -> dict[str, dict[str, Any]]:
    """The experiments that are asked for or may run, with their passes and tokens, about."""
    from .variants import planned_tokens
    from .verify import cut

    found: dict[str, dict[str, Any]] = {}
    names = {analyzer.name for analyzer in analyzers}
    if options.verify is not False and names & set(READERS[EFFECTS]):
        tokens = VERIFY_PASSES * sum(map(len, cut(prompts, 0)))
        found[EFFECTS] = {"passes": VERIFY_PASSES, "tokens": tokens, "if_short": options.verify is None}
    if options.sensitivity and not has_pictures(prompts):
        passes, tokens = planned_tokens(prompts.prompts)
        found[SENSITIVITY] = {"passes": passes, "tokens": tokens, "if_short": False}
    for name in visual.PROMPTS:
        chosen = visual.pictured(prompts, name)
        if chosen and options.verify is not False and names & set(READERS[name]):
            passes = visual.passes_before(prompts, layers, analyzers, name)
            tokens = round(passes * sum(map(len, chosen)) / len(chosen))
            found[name] = {"passes": passes, "tokens": tokens, "if_short": options.verify is None}
    return found


def _expected(described: ModelDescription, prompts: PromptSet, plan: TracePlan) -> Iterator[Signal]:
    """The signals of a plan that this model and these prompts can have."""
    pictures = any(prompt.visual is not None for prompt in prompts.prompts)
    for signal in plan.signals:
        experts = described.anatomy.main.n_experts or signal.source is not Source.EXPERTS
        dims = plan.sinks is not None or signal is not PHI
        if experts and dims and (pictures or signal not in OF_QUERIES):
            yield signal


def prediction(
    described: ModelDescription,
    prompts: PromptSet,
    plan: TracePlan,
    *,
    on_cpu: bool,
    device: str | None = None,
) -> Prediction:
    """The cost of tracing these prompts with this plan."""
    tower = described.anatomy.main
    batches = partition(prompts.prompts, most=plan.batch_prompts, tokens=plan.batch_tokens)
    widest = max(len(batch) * len(batch[0]) for batch in batches)
    tokens = sum(len(batch) * len(batch[0]) for batch in batches)
    return Prediction(
        weights=described.loaded_bytes,
        working=working_bytes(described, widest, plan) + picture_bytes(described, prompts, plan),
        available=available_memory(device),
        disk=sum(record_bytes(described, prompt, plan) for prompt in prompts.prompts),
        seconds=seconds_for(described, tokens) if on_cpu else None,
        batches=len(batches),
        signals=tuple(sorted(signal.name for signal in _expected(described, prompts, plan))),
        experiments={},
        query_blocks=described_blocks(tower, plan.blocks, max(map(len, prompts.prompts))),
        sampling=None if plan.sampling is None else plan.sampling.describe(),
    )


def plan_document(described: ModelDescription, prompts: PromptSet, predicted: Prediction) -> dict[str, Any]:
    """The plan as one JSON document."""
    from sinklens.core.canonical import plain

    document = {
        "schema": "sinklens/plan/1",
        "model": asdict(described.info),
        "inputs": prompts.description,
        "prediction": {
            **asdict(predicted),
            "stream": None if predicted.stream is None else predicted.stream.to_json(),
            "fits": predicted.fits,
            "weights_estimated": described.estimated,
            "dequantised": described.dequantised,
        },
    }
    found = plain(document)
    assert isinstance(found, dict)
    return found
