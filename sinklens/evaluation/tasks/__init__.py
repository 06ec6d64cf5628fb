"""Tasks: what a model is asked, how it is asked, and what comes of it as numbers per item."""

from __future__ import annotations

from .base import Answers, Task, registry
from .builtin import BUILTINS, read_task, tasks_for
from .captions import Captions
from .choice import Choice
from .classification import Classification
from .files import task_from_file, task_from_hub, task_from_rows
from .free import Generation
from .perplexity import Perplexity
from .yes_no import YesNo

__all__ = [
    "BUILTINS",
    "Answers",
    "Captions",
    "Choice",
    "Classification",
    "Generation",
    "Perplexity",
    "Task",
    "YesNo",
    "read_task",
    "registry",
    "task_from_file",
    "task_from_hub",
    "task_from_rows",
    "tasks_for",
]
