"""Run by torchrun in `test_together.py`: sinklens, but one process is killed, or all are stopped, amid the prompts."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from sinklens.cli.main import run
from sinklens.tracers import together

how, victim, sys.argv[1:] = sys.argv[1], sys.argv[2], sys.argv[3:]
own = together.run_group
calls = 0


def run_group(*args: Any) -> Any:
    global calls
    calls += 1
    if calls == 2:
        if how == "kill" and os.environ["RANK"] == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stop" and os.environ["RANK"] == victim:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)
    return own(*args)


together.run_group = run_group
run()
