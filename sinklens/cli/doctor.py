"""`sinklens doctor`: can this model be measured here, and do the measurements agree with the definition?"""

from __future__ import annotations

from typing import Annotated

import typer

from .profile import (
    Backend,
    Device,
    DeviceMap,
    Dtype,
    Images,
    Model,
    Offline,
    Prompts,
    Question,
    Remote,
    Revision,
    SeqLen,
    Trust,
)

NAME = "doctor"
HELP = "Run the self-check on a model and print what was found; exit code 5 if a check fails."
EXAMPLES = "Examples:  sinklens doctor  ·  sinklens doctor -m ./checkpoint --mode fused"


def command(
    model: Model = None,
    prompts: Prompts = None,
    images: Images = None,
    question: Question = None,
    seq_len: SeqLen = None,
    mode: Annotated[str, typer.Option(help="faithful or fused.")] = "faithful",
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    backend: Backend = None,
    remote: Remote = False,
    offline: Offline = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from sinklens.core.errors import SelfCheckError
    from sinklens.pipeline.doctor import examine
    from sinklens.pipeline.options import ProfileOptions

    from .console import ConsoleListener, print_json
    from .environment import quiet_libraries

    quiet_libraries(offline=offline)
    options = ProfileOptions(
        prompts=prompts,
        images=images,
        question=question,
        seq_len=seq_len,
        mode=mode,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        trust_remote_code=trust_remote_code,
        backend=backend,
        remote=remote,
    )
    listener = ConsoleListener(quiet=as_json)
    diagnosis = examine(model, options, listener)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        print(diagnosis)
    failed = [check.name for check in diagnosis.checks if not check.passed]
    if failed:
        raise SelfCheckError(f"{len(failed)} of {len(diagnosis.checks)} checks failed: {', '.join(failed)}.")
