"""Running prompts through a model with the taps attached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sinklens.core.errors import OutOfMemory
from sinklens.inputs.spec import Prompt, PromptSet
from sinklens.kernels.choice import statistics_kernel
from sinklens.kernels.spec import BlockPlan
from sinklens.models.spec import OpenedModel
from sinklens.models.sums import find_sums

from .announced import announced_on
from .attention import Edit, Mode
from .attention import sites as sites
from .backends import backend_of, modes_restored, open_with
from .backends.base import Counter
from .batch import Batch, collate, device_of, forward, shortened
from .experts import ExpertsTap, router_tap
from .record_experts import ROUTER_SIGNALS
from .record_vectors import OF_PROJECTION, projection_tap
from .record_vision import vision_tap
from .recorder import Limits, Recorder
from .sampling import Sampling, not_estimable
from .signals import ALL_SIGNALS, Signal, Source
from .signals_visual import OF_CONTRIBUTIONS
from .sink_dims import SinkRule
from .states import block_tap, down_proj_tap, input_tap
from .store import RunStore, packed, unpacked
from .trace import PromptRecord, Trace, layer_table


@dataclass(frozen=True)
class TracePlan:
    """What to record and how.

    Attributes:
        signals: Nothing else is recorded.
        own_experts: Let the model's own experts function compute the output beside the loop that measures.
        ablate: `(layer, expert)` pairs that put out zero.
        batch_prompts, batch_tokens: Largest batch, in prompts and in tokens with padding. A batch is one shard:
            what an interruption can lose at most.
        sinks: Which tokens of prompts with pictures are sinks; None means that no sink dims are known.
        sampling: Estimate what attention shows from some query rows; None looks at all.
    """

    signals: frozenset[Signal] = frozenset(ALL_SIGNALS)
    mode: Mode = Mode.FAITHFUL
    own_experts: bool = False
    ablate: frozenset[tuple[int, int]] = frozenset()
    limits: Limits = field(default_factory=Limits)
    blocks: BlockPlan = field(default_factory=BlockPlan)
    batch_prompts: int = 16
    batch_tokens: int = 4096
    sinks: SinkRule | None = None
    sampling: Sampling | None = None

    def sources(self) -> frozenset[Source]:
        return frozenset(signal.source for signal in self.signals)

    def describe(self) -> dict[str, Any]:
        """For the manifest, and compared when a run is resumed."""
        return {
            **({} if self.sampling is None else {"sampling": self.sampling.describe()}),
            "mode": str(self.mode),
            "signals": sorted(signal.name for signal in self.signals),
            "own_experts": self.own_experts,
            "limits": asdict(self.limits),
            "batch_prompts": self.batch_prompts,
            "batch_tokens": self.batch_tokens,
            "sinks": None if self.sinks is None else self.sinks.to_json(),
        }


@dataclass
class Pass:
    """One traced forward pass: the records, the model's output, and what the taps counted.

    Attributes:
        vision_blocks: Blocks of the vision tower whose attention was seen over all patches; None without pictures.
    """

    records: list[PromptRecord]
    output: Any
    attention_calls: int
    routed_rows: int
    vision_blocks: int | None = None


def trace_batch(opened: OpenedModel, batch: Batch, plan: TracePlan, *, logits: bool = True) -> Pass:
    """Trace one batch through the main tower. Nothing stays on the model, also after an error."""
    tower, backend = opened.anatomy.main, backend_of(opened)
    if (hosted := backend.hosted(opened, batch, plan)) is not None:
        return hosted
    recorder = Recorder(batch, len(tower.blocks), plan.signals, plan.limits, plan.sinks)
    if recorder.states.closely and not any(block.sum.checked for block in tower.blocks):
        short = shortened(batch)
        find_sums(opened.plain, tower, lambda: forward(opened.plain, short, logits=False))
    with recording(opened, batch, plan, recorder) as attention, vision_tap(opened, batch, plan) as vision:
        output = backend.forward(opened, batch, logits=logits)
    calls = attention.calls if attention is not None else 0
    records = recorder.records()
    if vision is not None:
        visual = batch.prompts[0].visual
        records[0].arrays.update(vision.arrays(None if visual is None else visual.objects))
    seen = None if vision is None else vision.blocks_seen
    return Pass(records, output, calls, recorder.experts.routed_rows, seen)


@contextmanager
def recording(
    opened: OpenedModel, batch: Batch, plan: TracePlan, recorder: Recorder
) -> Iterator[Counter | None]:
    """Show the blocks of the main tower to a recorder; yields what counts the attention calls, if they are shown."""
    model, tower = opened.module, opened.anatomy.main
    with ExitStack() as stack:
        attention = None
        if Source.ATTENTION in plan.sources():
            attention = stack.enter_context(
                backend_of(opened).attention(opened, batch, recorder.attention, plan)
            )
            if plan.signals & (OF_PROJECTION | OF_CONTRIBUTIONS):
                stack.enter_context(projection_tap(model, tower, recorder.attention.on_projection))
        if recorder.inputs.needed:
            stack.enter_context(input_tap(model, tower, recorder.inputs.on_input))
        if recorder.pictures.active:
            stack.enter_context(recorder.pictures.attached(opened))
        if Source.RESIDUAL in plan.sources():
            stack.enter_context(
                block_tap(model, tower, recorder.states.on_block, closely=recorder.states.closely)
            )
        if Source.DOWN_PROJ in plan.sources():
            stack.enter_context(down_proj_tap(model, tower, recorder.states.on_down_proj))
        if (recorder.experts.wanted or plan.ablate) and tower.n_experts:
            if plan.signals & ROUTER_SIGNALS:
                stack.enter_context(router_tap(model, tower, recorder.experts.on_router))
            experts = ExpertsTap(
                sites(model, tower, "experts"),
                recorder.experts.on_experts if recorder.experts.wanted else None,
                ablate=plan.ablate,
                own_output=plan.own_experts,
                lookup=recorder.experts.lookup,
            )
            stack.enter_context(experts.attached())
        yield attention


def edited_output(opened: OpenedModel, batch: Batch, edit: Edit) -> Any:
    """The model's output with an edit at the attention seam, for checks."""
    return backend_of(opened).edited(opened, batch, edit)


def partition(prompts: Sequence[Prompt], *, most: int, tokens: int) -> list[list[Prompt]]:
    """Batches of prompts of similar length. Depends on the prompts only, so a resumed run has the same batches."""
    batches: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda p: (-len(p), p.index)):
        # Sorted by length, so the first prompt of a batch is its width. Prompts with pictures go alone.
        full = not batches or len(batches[-1]) >= most
        full = full or prompt.visual is not None or batches[-1][-1].visual is not None
        if full or len(batches[-1][0]) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(prompt)
    return batches


def trace(
    model: Any,
    prompts: PromptSet | Iterable[Prompt],
    plan: TracePlan | None = None,
    *,
    store: RunStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trace:
    """Trace prompts through the main tower of a model.

    Args:
        model: An `OpenedModel`, or what `profile` takes: a name, a folder, a transformers model, a TransformerBridge, a
            model of nnsight.
        store: Where finished batches are kept; batches it already has are not run again.
        progress: Called with (prompts done, prompts in all) after each batch.

    Raises:
        OutOfMemory: Finished batches are in the store.
    """
    if not isinstance(model, OpenedModel):
        with modes_restored(model):
            return trace(open_with(model), prompts, plan, store=store, progress=progress)
    opened, plan = model, plan or TracePlan()
    plan = recordable(opened, plan)
    everything = tuple(prompts.prompts if isinstance(prompts, PromptSet) else prompts)
    result = empty_trace(opened, plan)
    result.records = store.load_records() if store else []
    if opened.spread is not None:  # only one of its processes has the folder
        result.records = unpacked(opened.spread.agree("traced before", packed(result.records))[0])
    done = {record.index for record in result.records}
    device = device_of(opened)
    groups = [
        group
        for group in partition(everything, most=plan.batch_prompts, tokens=plan.batch_tokens)
        if not all(prompt.index in done for prompt in group)
    ]
    if opened.blocks is not None and groups:
        from .streaming import trace_streamed

        result.records += trace_streamed(opened, groups, plan, store=store, progress=progress)
        groups = []
    for group in groups:
        records = run_group(opened, group, plan, device, len(done), saved=store is not None)
        result.records += records
        done |= {record.index for record in records}
        if store:
            store.append(records)
        if progress:
            progress(len(done), len(everything))
    result.records.sort(key=lambda record: record.index)
    return result


def recordable(opened: OpenedModel, plan: TracePlan) -> TracePlan:
    """The plan without what the library that runs the model cannot show, and what a sample of rows cannot."""
    left_out = set(backend_of(opened).missing(opened))
    if plan.sampling is not None:
        left_out |= set(not_estimable())
    return replace(plan, signals=plan.signals - left_out) if plan.signals & left_out else plan


def empty_trace(opened: OpenedModel, plan: TracePlan) -> Trace:
    """A trace of the main tower without prompts yet; what changes the model right now is said as `mitigations`."""
    tracing = {**plan.describe(), "attention_path": attention_path(opened, plan)}
    tracing["statistics"] = f"float32, {statistics_kernel(device_of(opened))}"
    if opened.blocks is not None:
        tracing["weights"] = "streamed: each block is read from disk once, and all prompts pass through it"
    if opened.spread is not None:
        tracing["weights"] = f"spread by the model's tensor-parallel plan over {opened.spread.size} processes"
    feature = vision_feature_layer(opened.module)
    if feature is not None:
        tracing["vision_feature_layer"] = feature
    on = announced_on(opened.module, opened.anatomy.main)
    if on:
        tracing["mitigations"] = on
    if opened.backend != "hf":
        missing = backend_of(opened).missing(opened)
        tracing["backend"] = opened.backend
        tracing["missing"] = {signal.name: why for signal, why in missing.items()}
    return Trace(opened.info, layer_table(opened.anatomy.main), [], tracing)


def run_group(
    opened: OpenedModel,
    group: Collection[Prompt],
    plan: TracePlan,
    device: torch.device,
    done: int,
    *,
    saved: bool = True,
) -> list[PromptRecord]:
    """The records of one batch, after `done` prompts, which are saved or not."""
    pad = getattr(opened.tokenizer, "pad_token_id", None) or 0
    try:
        batch = collate(list(group), pad_id=pad, device=device)
        return trace_batch(opened, batch, plan, logits=False).records
    except (torch.OutOfMemoryError, MemoryError) as error:
        longest = max(len(prompt) for prompt in group)
        raise OutOfMemory(
            f"Out of memory after {done} prompts, in a batch of {len(group)} x {longest} tokens.",
            detail="The finished prompts are saved." if saved else None,
            hint=f"Try: --batch-size 1, or --seq-len {max(32, longest // 2)}, or --device-map auto",
        ) from error


def vision_feature_layer(model: Any) -> int | None:
    """The block of the vision tower, counted from its end (-1), whose output the language model is given.

    Models that take several are known by the last of them; None where the config does not say.
    """
    config = getattr(model, "config", None)
    asked = getattr(config, "vision_feature_layer", None)
    asked = asked[-1] if isinstance(asked, (list, tuple)) and asked else asked
    if not isinstance(asked, int) or isinstance(asked, bool):
        return None
    blocks = getattr(getattr(config, "vision_config", None), "num_hidden_layers", None)
    # Hidden states begin with the embedding, so from the end both count alike.
    return asked if asked < 0 else None if not isinstance(blocks, int) else asked - 1 - blocks


def attention_path(opened: OpenedModel, plan: TracePlan) -> str:
    """In words, which kernel gives the output and which the statistics."""
    return backend_of(opened).attention_path(opened, plan)
