"""Everything a run needs before its first prompt: model, prompts, analyzers, plan, and the self-check."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sinklens.analyzers import Analyzer, chosen_analyzers, registry
from sinklens.core.errors import DataError, ModelError, UsageError
from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.models.streaming import sampled
from sinklens.tracers.announced import announced_on
from sinklens.tracers.attention import Mode
from sinklens.tracers.backends import backend_of, open_with
from sinklens.tracers.batch import Batch, forward
from sinklens.tracers.executor import TracePlan, recordable
from sinklens.tracers.recorder import Limits
from sinklens.tracers.sampling import Sampling, not_estimable, refuse_sampling
from sinklens.tracers.selfcheck import Check, self_check
from sinklens.tracers.store import RunStore
from sinklens.tracers.streaming import take_up
from sinklens.tracers.streaming.check import check_streamed

from .backends import chosen_backend, named_analyzers, refuse_lacking
from .beside_plan import refuse_one_process
from .listener import Listener
from .memory import memory_told
from .options import ProfileOptions
from .picture_prompts import (
    has_pictures,
    read_pictures,
    refuse_unread_dims,
    refuse_without_pictures,
    wants_pictures,
)
from .query_blocks import fitting_blocks
from .reach import default_length, refuse_beyond_reach
from .sinks import with_sinks
from .streamed_blocks import Choice, budget_of, choose, refuse_in_memory
from .visual_experiments import EXIT, HORIZON, REMOVAL

DEFAULT_PROMPTS = 32

EFFECTS, SENSITIVITY = "effects", "sensitivity"
READERS = {
    EFFECTS: ("causal-effects", "super-experts"),
    SENSITIVITY: ("sensitivity",),
    REMOVAL: ("visual-effects",),
    EXIT: ("visual-exit",),
    HORIZON: ("information-horizon",),
}
"""The analyzers that read the result of an experiment; the first one is added where it was asked for by name."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before the first prompt.

    Attributes:
        reopen: The same model in another dtype (`float32`, ...), for experiments; never the caller's own object.
        model: The model as it was given, by name or in memory.
    """

    opened: OpenedModel
    prompts: PromptSet
    analyzers: tuple[Analyzer, ...]
    plan: TracePlan
    reopen: Callable[[str], OpenedModel]
    model: Any


def analyzers_for(options: ProfileOptions) -> tuple[Analyzer, ...]:
    """The analyzers asked for, and those that report an experiment that was asked for by name."""
    chosen = chosen_analyzers(options.analyzers)
    wanted = [(EFFECTS, options.verify), (SENSITIVITY, options.sensitivity)]
    names = {READERS[name][0] for name, asked in wanted if asked} & set(registry)
    missing = names - {analyzer.name for analyzer in chosen}
    added = tuple(registry[name]() for name in missing)
    return tuple(sorted((*chosen, *added), key=lambda analyzer: analyzer.place))


def prepare(
    model: Any,
    tokenizer: Any,
    options: ProfileOptions,
    listener: Listener,
    processor: Any = None,
    *,
    streaming: bool = False,
    choice: Choice | None = None,
    resumed: RunStore | None = None,
    spread: int | None = None,
) -> Prepared:
    """Open the model and read the prompts.

    Args:
        streaming: Whether blocks may stay on disk. Whoever changes weights needs them in memory.
        choice: Whether they do, where several processes have agreed on it.
        resumed: The folder of an interrupted run that goes on.
        spread: Processes that hold the model together by its tensor-parallel plan, each of which calls this.
    """
    refuse_one_process(options, spread)
    analyzers = analyzers_for(options)
    if not streaming:
        refuse_in_memory(options)
    else:
        choice = choice or choose(model, options)
    held = choice is not None and not choice.on
    source = _source(options, tokenizer, processor, choice, spread)
    with memory_told("the model was opened", model, options, streams=held):
        opened = open_with(model, dtype=options.dtype, **source)
    if opened.blocks is not None and choice is not None:
        opened.blocks.budget, opened.blocks.why = budget_of(options), choice.why
        if resumed is not None:
            take_up(opened.blocks, resumed)
    refuse_lacking(options, opened)
    listener.opened(opened)
    if not wants_pictures(options, opened.default_prompts):
        with (
            memory_told("the model was run for the first time", model, options, streams=held),
            _whole(opened),
        ):
            _reads_text(opened)
    prompts = prompts_for(options, opened)
    if streaming:  # a profile: other runs have tasks with pictures besides
        refuse_unread_dims(options.sink_dims, prompts)
    analyzers, plan = _planned(options, analyzers, opened, prompts, listener)
    return Prepared(opened, prompts, analyzers, plan, _reopening(model, opened, source), model)


def _source(
    options: ProfileOptions, tokenizer: Any, processor: Any, choice: Choice | None, spread: int | None
) -> dict[str, Any]:
    """What `open_with` takes besides the model and the dtype."""
    source: dict[str, Any] = {
        "backend": chosen_backend(options),
        "tokenizer": tokenizer,
        "processor": processor,
        "revision": options.revision,
        "device": options.device,
        "device_map": options.device_map,
        "trust_remote_code": options.trust_remote_code,
    }
    if choice is not None and choice.on:
        source["stream"] = True
    if spread is not None:
        source["spread"] = spread
    return source


def _reopening(model: Any, opened: OpenedModel, source: dict[str, Any]) -> Callable[[str], OpenedModel]:
    """Gives the same model in another dtype."""

    def reopen(dtype: str) -> OpenedModel:
        if opened.backend != "hf" or isinstance(model, OpenedModel | nn.Module):
            changed = backend_of(opened).for_experiments(opened)
            return copied(opened if isinstance(changed, str) else changed, dtype)
        return open_with(model, dtype=dtype, **source)

    return reopen


def _planned(
    options: ProfileOptions,
    analyzers: tuple[Analyzer, ...],
    opened: OpenedModel,
    prompts: PromptSet,
    listener: Listener,
) -> tuple[tuple[Analyzer, ...], TracePlan]:
    """The analyzers that apply to these prompts, and what is recorded for them.

    Raises:
        SinklensError: What was asked for does not go with the prompts, or the prompts not with the model.
    """
    refuse_without_pictures(options.analyzers, prompts)
    analyzers = those_that_apply(options, analyzers, prompts)
    refuse_short(options, analyzers, prompts)
    refuse_beyond_reach(opened, prompts)
    plan = reading(plan_for(options, analyzers), options, prompts)
    listener.planned(prompts, analyzers)
    plan = with_sinks(plan, options, opened, prompts, analyzers)
    refuse_sampling(plan, opened, prompts)
    return analyzers, recordable(opened, plan)


def _whole(opened: OpenedModel) -> AbstractContextManager[Any]:
    """Inside, the model can be run in one go: blocks that stay on disk are represented by a few."""
    return nullcontext() if opened.blocks is None else sampled(opened.blocks, opened.anatomy)


def reading(plan: TracePlan, options: ProfileOptions, prompts: PromptSet) -> TracePlan:
    """The plan with how query rows are read: how many at once, and whether all."""
    sampling = worth_sampling(options, prompts)
    signals = plan.signals if sampling is None else plan.signals - set(not_estimable())
    return replace(plan, signals=signals, sampling=sampling, blocks=fitting_blocks(plan.blocks))


def worth_sampling(options: ProfileOptions, prompts: PromptSet) -> Sampling | None:
    """The sample of query rows that was asked for, said among the prompts' warnings; None where it would be all."""
    if options.sample_queries is None:
        return None
    asked = Sampling.parse(options.sample_queries, options.seed)
    lengths = [len(prompt) for prompt in prompts.prompts]
    sampled = [length for length in lengths if asked.count(length) < length]
    if sampled:
        most, least = max(sampled), min(sampled)
        drawn = " to ".join(f"{asked.count(n)} of {n}" for n in dict.fromkeys((least, most)))
        warning = f"Attention is estimated from a sample of the query rows: {drawn} per prompt, standard errors beside."
    else:
        warning = (
            f"No prompt has more query rows than the {asked.count(max(lengths))} asked for: none is left out."
        )
    prompts.description.setdefault("warnings", []).append(warning)
    return asked if sampled else None


def those_that_apply(
    options: ProfileOptions, analyzers: tuple[Analyzer, ...], prompts: PromptSet
) -> tuple[Analyzer, ...]:
    """Without pictures, analyzers of pictures take part only where they were asked for by name."""
    if has_pictures(prompts):
        return analyzers
    asked = options.analyzers.split(",") if isinstance(options.analyzers, str) else options.analyzers
    items = [item for item in asked if item not in ("all", "")]
    named = {analyzer.name for analyzer in (chosen_analyzers(items) if items else ())}
    return tuple(a for a in analyzers if not a.of_pictures or a.name in named)


def copied(opened: OpenedModel, dtype: str) -> OpenedModel:
    """A copy of a model in memory in another dtype; the caller's own object is left alone.

    Weights and saved buffers change their dtype; buffers that are computed (rotary frequencies) and modules that the
    model keeps in float32 do not, as when it is loaded in that dtype.

    Raises:
        ModelError: A mitigation is on; the copy would be the unchanged model.
    """
    on = announced_on(opened.module, opened.anatomy.main)
    if on:
        names = ", ".join(what["name"] for what in on)
        raise ModelError(
            f"This model cannot be copied while a mitigation is on it ({names}).",
            detail="The copy, in another dtype, would be the model without the mitigation.",
            hint="Leave the experiment out that needs a copy (sensitivity), or give a model by its name.",
        )
    wanted = getattr(torch, dtype)
    module = copy.deepcopy(opened.module)
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    saved = module.state_dict(keep_vars=True)
    for name, value in saved.items():
        if value.is_floating_point() and not any(part in name for part in kept):
            value.data = value.data.to(wanted)
    return replace(opened, module=module, info=replace(opened.info, dtype=dtype))


def prompts_for(options: ProfileOptions, opened: OpenedModel) -> PromptSet:
    """The prompts of a run of an opened model."""
    from sinklens.models.processors import processor_of

    own, config = opened.default_prompts, opened.module.config
    return read_prompts(options, opened.tokenizer, own, config, lambda: processor_of(opened))


def read_prompts(
    options: ProfileOptions, tokenizer: Any, own: str | None, config: Any, processor: Callable[[], Any]
) -> PromptSet:
    """The prompts that were asked for, else those that came with the checkpoint, else the bundled corpus.

    Args:
        own: Path of the checkpoint's own prompts, if it has any.
        config: The model's config, for the longest input it takes.
        processor: Gives what reads pictures; not called for texts.
    """
    from sinklens.inputs import load_prompts

    if wants_pictures(options, own):
        return read_pictures(options, own, config, processor)
    if options.question is not None:
        raise UsageError(
            "--question is asked about pictures, and the prompts have none.",
            hint="Give pictures with --images PATH, or leave it out.",
        )
    chosen = options.prompts if options.prompts is not None else own
    prompts = load_prompts(
        chosen,
        tokenizer,
        n=options.n or (DEFAULT_PROMPTS if chosen is None else None),
        seq_len=options.seq_len or default_length(config),
        bos=options.bos,
        chat_template=options.chat_template,
        pack=options.pack,
        seed=options.seed,
    )
    if options.prompts is None and own is not None:
        prompts.description["source"] = "prompts that came with the checkpoint"
    return prompts


def _reads_text(opened: OpenedModel) -> None:
    """Refuse a model that cannot be run on tokens alone, before anything is read for it.

    Raises:
        ModelError: Its forward pass needs other inputs, pictures most often.
    """
    device = next(opened.plain.parameters()).device
    if device.type == "meta":  # the model is elsewhere
        return
    ids = torch.arange(4, device=device)[None]
    try:
        forward(opened.plain, Batch({"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool)))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        # Whatever a model raises when its inputs are missing: types and words differ by family.
        said = (str(error).splitlines() or [""])[0]
        inputs = list(inspect.signature(opened.plain.forward).parameters)
        raise ModelError(
            f"{type(opened.plain).__name__} cannot be run on text alone: {type(error).__name__}: {said[:160]}",
            detail=f"Its forward pass takes: {', '.join(inputs[:4])}.",
            hint="Give the part of it that reads text, for instance model.text_model.",
        ) from error


def refuse_short(options: ProfileOptions, analyzers: tuple[Analyzer, ...], prompts: PromptSet) -> None:
    """Refuse prompts that are all shorter than an analyzer needs that was named, or than every one needs.

    Those that were not named say themselves that they do not apply.

    Raises:
        DataError: Before anything is run.
    """
    named = named_analyzers(options)
    longest = max(len(prompt) for prompt in prompts.prompts)
    short = [analyzer for analyzer in analyzers if getattr(analyzer, "min_tokens", 0) > longest]
    names = {analyzer.name for analyzer in (chosen_analyzers(named) if named else ())}
    refused = [analyzer for analyzer in short if analyzer.name in names or len(short) == len(analyzers)]
    if refused:
        needed = getattr(refused[0], "min_tokens", 0)
        raise DataError(
            f"{refused[0].name} needs prompts of at least {needed} tokens; the longest has {longest}.",
            hint="Give longer prompts, join short ones with --pack, or leave this analyzer out with --analyzers.",
        )


def plan_for(options: ProfileOptions, analyzers: tuple[Analyzer, ...]) -> TracePlan:
    """Record the union of what the analyzers need, and nothing else."""
    plan = TracePlan(
        signals=frozenset(signal for analyzer in analyzers for signal in analyzer.needs),
        mode=Mode(options.mode),
        limits=Limits(
            strongest=options.keep_positions,
            lens_every=max((getattr(analyzer, "lens_every", 0) for analyzer in analyzers), default=0),
        ),
    )
    return plan if options.batch_size is None else replace(plan, batch_prompts=options.batch_size)


def checked_plan(prepared: Prepared) -> tuple[TracePlan, list[Check]]:
    """Run the self-check; where the expert loop rounds differently from the model's kernel, run both."""
    plan = prepared.plan
    check = self_check if prepared.opened.blocks is None else check_streamed
    checks = check(prepared.opened, prepared.prompts.prompts, plan)
    changed = any(check.name.startswith("tracing leaves") and not check.passed for check in checks)
    if changed and prepared.opened.anatomy.main.n_experts and not plan.own_experts:
        plan = replace(plan, own_experts=True)
        checks = check(prepared.opened, prepared.prompts.prompts, plan)
    return plan, checks


def model_request(model: Any, opened: OpenedModel) -> str | None:
    """What to open again on resume; a model in memory must be given again by its owner."""
    return model if isinstance(model, str) else opened.info.id if model is None else None
