"""Process-wide settings that only a command may make; importing the library changes nothing."""

from __future__ import annotations

import logging
import os
import signal
import warnings


def quiet_libraries(*, offline: bool = False) -> None:
    """Keep stdout clean and stderr readable: no third-party progress bars or advice."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):  # the latter tells every retry
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # A scheduler's polite stop is treated like Ctrl-C: finished batches are kept and the exit code says so.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
