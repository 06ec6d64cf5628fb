"""The main job: from a model and prompts to a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from sinklens.analyzers import Analyzer, chosen_analyzers
from sinklens.core.errors import DataError, InterruptedRun, SelfCheckError, UsageError
from sinklens.core.manifest import Clock, build_manifest
from sinklens.inputs.spec import PromptSet
from sinklens.models.spec import OpenedModel
from sinklens.tracers.attention import Mode
from sinklens.tracers.executor import TracePlan, empty_trace, trace
from sinklens.tracers.recorder import Limits
from sinklens.tracers.selfcheck import Check, self_check
from sinklens.tracers.store import RunStore
from sinklens.tracers.trace import Trace

from .options import ProfileOptions
from .removal import removal_effect
from .run import Run, load_run, stored_manifest, write_run

DEFAULT_PROMPTS, DEFAULT_SEQ_LEN = 32, 512
RESERVED_POSITIONS = 2
"""RoBERTa and OPT keep the first two entries of their position table for padding."""


class Listener(Protocol):
    """Who wants to hear how far a run is; the command line draws it."""

    def opened(self, opened: OpenedModel) -> None: ...
    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None: ...
    def checked(self, checks: list[Check]) -> None: ...
    def progress(self, done: int, total: int) -> None: ...


class Silent:
    """Nobody listens."""

    def opened(self, opened: OpenedModel) -> None:
        """The model is in memory."""

    def planned(self, prompts: PromptSet, analyzers: tuple[Analyzer, ...]) -> None:
        """It is known what will be run."""

    def checked(self, checks: list[Check]) -> None:
        """The self-check is done."""

    def progress(self, done: int, total: int) -> None:
        """Some prompts are finished."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before the first prompt."""

    opened: OpenedModel
    prompts: PromptSet
    analyzers: tuple[Analyzer, ...]
    plan: TracePlan


def profile(
    model: Any = None,
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    resume: str | Path | None = None,
    listener: Listener | None = None,
    argv: list[str] | None = None,
    options: ProfileOptions | None = None,
    **settings: Any,
) -> Run:
    """Profile a model: does it have attention sinks, massive activations, Super Experts?

    Args:
        model: Alias, `org/name@revision`, local folder, `bundled:NAME`, or a transformers model in memory (then give
            its `tokenizer`). None takes the bundled checkpoint.
        out: Run folder to write; None keeps everything in memory.
        force: Replace a run that is already in `out`.
        resume: Run folder of an interrupted run; model and options come from its manifest.
        options: All options at once; or give them as keywords (`prompts`, `n`, `seq_len`, `analyzers`, ...).

    Returns:
        The run: findings as attributes, `.document`, `.report(path)`, `.save(folder)`.

    Raises:
        SelfCheckError: A check on the measurement failed; the run folder says which, and there is no verdict.
        SinklensError: The model, the prompts or the options cannot be used.
    """
    listener = listener or Silent()
    if resume is not None:
        changed = sorted(settings) if options is None else ["options"]
        if changed or isinstance(model, str):
            raise UsageError(
                f"A resumed run takes model and options from its manifest; {', '.join(changed) or 'model'} was given.",
                hint="Leave it out, or start another run with --out.",
            )
        return _resume(Path(resume), model, tokenizer, listener, argv)
    options = options or ProfileOptions(**settings)
    if isinstance(model, nn.Module):
        with modes_restored(model):
            return _start(model, tokenizer, out, force, listener, argv, options)
    return _start(model, tokenizer, out, force, listener, argv, options)


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Measuring needs eval mode; a caller's model gets back the mode each of its modules was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _start(
    model: Any,
    tokenizer: Any,
    out: str | Path | None,
    force: bool,
    listener: Listener,
    argv: list[str] | None,
    options: ProfileOptions,
) -> Run:
    chosen_analyzers(options.analyzers)  # a misspelt analyzer is told before a large model is loaded
    if out is None:
        prepared = prepare(model, tokenizer, options, listener)
        return _Session(prepared, options, None, listener, argv, None).run()
    store = RunStore(out)
    with store.created(force=force), store.locked():
        prepared = prepare(model, tokenizer, options, listener)
        request = model_request(model, prepared.opened)
        return _Session(prepared, options, store, listener, argv, request).run()


def prepare(model: Any, tokenizer: Any, options: ProfileOptions, listener: Listener) -> Prepared:
    """Open the model and read the prompts."""
    from sinklens.models.opening import open_model

    analyzers = chosen_analyzers(options.analyzers)
    opened = open_model(
        model,
        tokenizer=tokenizer,
        revision=options.revision,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
    )
    listener.opened(opened)
    prompts = read_prompts(options, opened.tokenizer, opened.default_prompts, opened.module.config)
    for analyzer in analyzers:
        _long_enough(analyzer, prompts)
    _within_reach(opened, prompts)
    listener.planned(prompts, analyzers)
    return Prepared(opened, prompts, analyzers, plan_for(options, analyzers))


def read_prompts(options: ProfileOptions, tokenizer: Any, own: str | None, config: Any) -> PromptSet:
    """The prompts that were asked for, else those that came with the checkpoint, else the bundled corpus.

    Args:
        own: Path of the checkpoint's own prompts, if it has any.
        config: The model's config, for the longest input it takes.
    """
    from sinklens.inputs import load_prompts

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


def _long_enough(analyzer: Analyzer, prompts: PromptSet) -> None:
    """Refuse prompts that are all shorter than the metric needs, before anything is run."""
    needed = getattr(analyzer, "min_tokens", 0)
    longest = max(len(prompt) for prompt in prompts.prompts)
    if longest < needed:
        raise DataError(
            f"{analyzer.name} needs prompts of at least {needed} tokens; the longest has {longest}.",
            hint="Give longer prompts, join short ones with --pack, or leave this analyzer out with --analyzers.",
        )


def _within_reach(opened: OpenedModel, prompts: PromptSet) -> None:
    """Refuse prompts with tokens or positions that the model has no embedding for, before it fails on them."""
    module: Any = opened.module
    tokens = module.get_input_embeddings() if hasattr(module, "get_input_embeddings") else None
    largest = max(max(prompt.token_ids) for prompt in prompts.prompts)
    if isinstance(tokens, nn.Embedding) and largest >= tokens.num_embeddings:
        raise DataError(
            f"The prompts have token id {largest}, but the model has embeddings for {tokens.num_embeddings} tokens.",
            detail="The tokenizer does not belong to this model, or the token ids do not.",
            hint="Give the model's own tokenizer.",
        )
    limit = position_limit(opened.module.config)
    longest = max(len(prompt) for prompt in prompts.prompts)
    if limit is not None and longest > limit and _learns_positions(opened.module, tokens, limit):
        raise DataError(
            f"The longest prompt has {longest} tokens; this model has learned positions for {limit}.",
            hint=f"Cut the prompts: --seq-len {limit - RESERVED_POSITIONS}",
        )


def _learns_positions(model: nn.Module, tokens: Any, limit: int) -> bool:
    """Whether the model looks positions up in a table (rotary models compute them and go on beyond their limit)."""
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return any(limit <= table.num_embeddings <= limit + RESERVED_POSITIONS for table in tables)


def position_limit(config: Any) -> int | None:
    """The longest input the config allows, None if it names none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return limit if isinstance(limit, int) and limit > RESERVED_POSITIONS else None


def default_length(config: Any) -> int:
    """The default sequence length, or the longest the model's learned positions allow."""
    limit = position_limit(config)
    return DEFAULT_SEQ_LEN if limit is None else min(DEFAULT_SEQ_LEN, limit - RESERVED_POSITIONS)


def plan_for(options: ProfileOptions, analyzers: tuple[Analyzer, ...]) -> TracePlan:
    """Record the union of what the analyzers need, and nothing else."""
    plan = TracePlan(
        signals=frozenset(signal for analyzer in analyzers for signal in analyzer.needs),
        mode=Mode(options.mode),
        limits=Limits(strongest=options.keep_positions),
    )
    return plan if options.batch_size is None else replace(plan, batch_prompts=options.batch_size)


def checked_plan(prepared: Prepared) -> tuple[TracePlan, list[Check]]:
    """Run the self-check; where the expert loop rounds differently from the model's kernel, run both."""
    plan = prepared.plan
    checks = self_check(prepared.opened, prepared.prompts.prompts, plan)
    changed = any(check.name.startswith("tracing leaves") and not check.passed for check in checks)
    if changed and prepared.opened.anatomy.main.n_experts and not plan.own_experts:
        plan = replace(plan, own_experts=True)
        checks = self_check(prepared.opened, prepared.prompts.prompts, plan)
    return plan, checks


def model_request(model: Any, opened: OpenedModel) -> str | None:
    """What to open again on resume; a model in memory must be given again by its owner."""
    return model if isinstance(model, str) else opened.info.id if model is None else None


class _Session:
    """One run from the self-check to the saved result."""

    def __init__(
        self,
        prepared: Prepared,
        options: ProfileOptions,
        store: RunStore | None,
        listener: Listener,
        argv: list[str] | None,
        request: str | None,
    ) -> None:
        self.prepared, self.store, self.listener, self.argv = prepared, store, listener, argv
        self.clock = Clock()
        self.request = {"model": request, **options.request()}

    def run(self, before: dict[str, Any] | None = None) -> Run:
        """Check, trace, analyze, save.

        Args:
            before: The manifest of the interrupted run that this one continues.
        """
        plan, checks = checked_plan(self.prepared)
        self.listener.checked(checks)
        empty = empty_trace(self.prepared.opened, plan)
        if before is not None:
            _same_run(before, self.prepared, empty)
        failed = [check for check in checks if not check.passed]
        if failed:
            self._save_untrusted(empty, checks)
            raise _untrusted(failed, self.store)
        self._describe(empty, checks, "running")
        result = self._trace(plan)
        run = Run(result, self.prepared.analyzers, checks)
        self._describe(result, checks, "complete")
        if self.request["verify"]:
            run = self._verified(run, plan)
        if self.store is not None:
            write_run(run, self.store)
        return run

    def _verified(self, run: Run, plan: TracePlan) -> Run:
        """The run with the effect of removing its Super Experts, if it has any."""
        found = run.findings.get("super-experts")
        if found is None or not found.rows:
            return run
        prompts = self.prepared.prompts.prompts
        effect = removal_effect(self.prepared.opened, prompts, plan, run.trace, found.rows)
        if effect is None:
            return run
        run.trace.manifest["removal"] = effect
        return Run(run.trace, run.analyzers, run.checks)

    def _trace(self, plan: TracePlan) -> Trace:
        try:
            return trace(
                self.prepared.opened,
                self.prepared.prompts,
                plan,
                store=self.store,
                progress=self.listener.progress,
            )
        except KeyboardInterrupt:
            if self.store is None:
                raise InterruptedRun("Stopped. Nothing was saved, because the run has no folder.") from None
            done, total = len(self.store.load_records()), len(self.prepared.prompts)
            raise InterruptedRun(
                f"Stopped. {done}/{total} prompts saved.",
                hint=f"Continue: sinklens profile --resume {self.store.folder}",
            ) from None

    def _describe(self, described: Trace, checks: list[Check], status: str) -> None:
        """Put the manifest on a trace and, while the run is going, on disk."""
        described.manifest = build_manifest(
            clock=self.clock,
            argv=self.argv,
            seeds={"prompts": self.request["seed"]},
            device=str(next(self.prepared.opened.module.parameters()).device),
            status=status,
            request=self.request,
            inputs=self.prepared.prompts.description,
            tracing=described.tracing,
        )
        if self.store is not None and status == "running":
            self.store.write_manifest(stored_manifest(described, self.prepared.analyzers, checks))

    def _save_untrusted(self, empty: Trace, checks: list[Check]) -> None:
        self._describe(empty, checks, "untrusted")
        if self.store is not None:
            write_run(Run(empty, self.prepared.analyzers, checks, findings={}), self.store)


def _untrusted(failed: list[Check], store: RunStore | None) -> SelfCheckError:
    check = failed[0]
    value = "" if check.value is None else f"found {check.value:g}"
    limit = "" if check.limit is None else f", limit {check.limit:g}"
    others = f" {len(failed) - 1} other checks failed too." if len(failed) > 1 else ""
    return SelfCheckError(
        f"Self-check failed: {check.name}. No verdict is given.{others}",
        detail=f"{value}{limit}: {check.detail[:160]}",
        hint=f"All checks: {store.folder / 'summary.json'}"
        if store
        else "See all checks: sinklens doctor -m MODEL",
    )


def _resume(folder: Path, model: Any, tokenizer: Any, listener: Listener, argv: list[str] | None) -> Run:
    """Continue an interrupted run with the model and options of its manifest."""
    store = RunStore(folder)
    before = store.read_manifest()
    if before.get("status") == "complete":
        return load_run(folder)
    request = dict(before["request"])
    asked = request.pop("model")
    given = request.pop("prompts_given", None)
    if given is not None or (model is None and asked is None):
        raise UsageError(
            f"The run in {folder} was started from objects in memory ({given or 'the model'}).",
            hint="Start it again from Python.",
        )
    request["analyzers"] = tuple(request["analyzers"])
    options = ProfileOptions(**request)
    with store.locked():
        prepared = prepare(model if model is not None else asked, tokenizer, options, listener)
        return _Session(prepared, options, store, listener, argv, asked).run(before)


def _same_run(before: dict[str, Any], prepared: Prepared, now: Trace) -> None:
    """Refuse to mix two runs: the model's files, the prompts and the tracing must be those of the manifest."""
    from dataclasses import asdict

    from sinklens.core.canonical import plain

    pairs = {
        "the model": (before["model"], plain(asdict(prepared.opened.info))),
        "the prompts": (before["inputs"].get("sha256"), prepared.prompts.description.get("sha256")),
        "the tracing": (before["tracing"], plain(now.tracing)),
    }
    changed = [what for what, (then, today) in pairs.items() if then != today]
    if changed:
        raise DataError(
            f"The run cannot be resumed: {' and '.join(changed)} changed since it was started.",
            hint="Start it again into another folder with --out.",
        )
