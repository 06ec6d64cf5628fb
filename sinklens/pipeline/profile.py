"""The main job: from a model and prompts to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinklens.analyzers import chosen_analyzers
from sinklens.core.errors import UsageError
from sinklens.tracers.backends import modes_restored
from sinklens.tracers.store import RunStore

from .backends import chosen_backend
from .in_step import profile_in_memory, spread_in_memory
from .listener import Listener
from .options import ProfileOptions
from .prepare import model_request, prepare
from .run import Run
from .session import Session, resume_run
from .watched import watched


def profile(
    model: Any = None,
    *,
    tokenizer: Any = None,
    processor: Any = None,
    out: str | Path | None = None,
    force: bool = False,
    resume: str | Path | None = None,
    listener: Listener | None = None,
    progress: bool = True,
    argv: list[str] | None = None,
    options: ProfileOptions | None = None,
    **settings: Any,
) -> Run:
    """Profile a model: does it have attention sinks, massive activations, Super Experts?

    Args:
        model: Alias, `org/name@revision`, local folder, `bundled:NAME`, or a model in memory: of transformers (then
            give its `tokenizer`, or its `processor` if it reads pictures), a TransformerBridge, or a model of nnsight.
            None takes the bundled checkpoint. A model that torchrun's processes hold together by a tensor-parallel plan
            is profiled by all of them, each of which calls this with the same arguments; process 0 writes `out`.
        out: Run folder to write; None keeps everything in memory.
        force: Replace a run that is already in `out`.
        resume: Run folder of an interrupted run; model and options come from its manifest.
        progress: In a notebook, show how far the run is in one line under the cell; elsewhere nothing is shown.
        options: All options at once; or give them as keywords (`prompts`, `images`, `question`, `n`, `analyzers`, ...).

    Returns:
        The run: findings as attributes, `.document`, `.report(path)`, `.save(folder)`.

    Raises:
        SelfCheckError: A check on the measurement failed; the run folder says which, and there is no verdict.
        SinklensError: The model, the prompts or the options cannot be used.
    """
    if resume is not None:
        changed = sorted(settings) if options is None else ["options"]
        if changed or isinstance(model, str):
            raise UsageError(
                f"A resumed run takes model and options from its manifest; {', '.join(changed) or 'model'} was given.",
                hint="Leave it out, or start another run with --out.",
            )
        with watched(listener, progress) as heard:
            return resume_run(Path(resume), model, tokenizer, heard, argv, processor)
    options = options or ProfileOptions(**settings)
    with modes_restored(model), watched(listener, progress) as heard:
        return _start(model, tokenizer, processor, out, force, heard, argv, options)


def _start(
    model: Any,
    tokenizer: Any,
    processor: Any,
    out: str | Path | None,
    force: bool,
    listener: Listener,
    argv: list[str] | None,
    options: ProfileOptions,
) -> Run:
    chosen_analyzers(options.analyzers)  # a misspelt analyzer is told before a large model is loaded
    chosen_backend(options)
    spread = spread_in_memory(model)
    if spread is not None:
        return profile_in_memory(
            model,
            spread,
            out=out,
            force=force,
            options=options,
            listener=listener,
            argv=argv,
            tokenizer=tokenizer if processor is None else getattr(processor, "tokenizer", tokenizer),
        )
    if out is None:
        prepared = prepare(model, tokenizer, options, listener, processor, streaming=True)
        return Session(prepared, options, None, listener, argv, None).run()
    store = RunStore(out)
    with store.created(force=force), store.locked():
        prepared = prepare(model, tokenizer, options, listener, processor, streaming=True)
        request = model_request(model, prepared.opened)
        return Session(prepared, options, store, listener, argv, request).run()
