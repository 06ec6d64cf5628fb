"""Run by torchrun in `test_tensor_parallel.py`: sinklens, but one of the processes that hold the model is killed."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from sinklens.cli.main import run
from sinklens.tracers import executor

victim, sys.argv[1:] = sys.argv[1], sys.argv[2:]
own = executor.run_group
calls = 0


def run_group(*args: Any, **named: Any) -> Any:
    global calls
    calls += 1
    if calls == 2 and os.environ["RANK"] == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*args, **named)


executor.run_group = run_group
run()
