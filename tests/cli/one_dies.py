"""Run by torchrun in `test_together.py` and `test_stream_together.py`: sinklens, but one process is killed, or all are
stopped, amid the prompts.

Whole models run one batch after another; of streamed ones a batch passes one block after another.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from sinklens.cli.main import run
from sinklens.tracers import together
from sinklens.tracers.streaming.sweep import Sweep

how, victim, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
own, own_step = together.run_group, Sweep._step
calls = 0


def perhaps_die(call: int) -> None:
    global calls
    calls += 1
    if calls == call:
        if how == "kill" and os.environ["RANK"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop" and os.environ["RANK"] == victim:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


def run_group(*args: Any) -> Any:
    perhaps_die(2)
    return own(*args)


def step(self: Sweep, journey: Any, index: int) -> None:
    perhaps_die(6)
    own_step(self, journey, index)


together.run_group, Sweep._step = run_group, step
run()
