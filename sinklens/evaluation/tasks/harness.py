"""Tasks of the lm-evaluation-harness, asked of the model as it is now, mitigations included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinklens.core.errors import DataError, UsageError
from sinklens.models.spec import OpenedModel

from ..items import Item
from ..metrics import Metric
from ..running import Progress, Question, require_speaker
from .base import Answers, Task, registry

RIGHT_OR_WRONG = {"acc", "acc_norm", "exact_match", "em"}
"""Metrics of the harness that are 0 or 1 per document."""
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@registry.register("lm-eval")
@dataclass(frozen=True, kw_only=True)
class Harness(Task):
    """A task of lm-eval: its documents, prompts, few-shot examples and per-document metrics, as the package has them.

    How it is computed: the model in memory, with whatever is on it, is handed to lm-eval's own `HFLM` and asked the
    documents of one half; metrics that the package gives per document and averages are compared. Others (corpus
    scores) have no value per item and are left out.

    Args:
        harness: Name of the task in the package.
        found: The metrics it gives per document, and for each whether more is better.
        shots: Few-shot examples; None leaves it to the task.
        include_path: Folder with task files of your own.
        batch_size: Of the package's runs.
    """

    harness: str
    found: tuple[tuple[str, bool], ...]
    shots: int | None = None
    include_path: str | None = None
    batch_size: int = 8

    kind = "lm-eval"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(
            Metric(
                name,
                name.replace("_", " "),
                "mean over documents",
                name,
                better=1 if more else -1,
                role="other" if rank else "primary",
                binary=name in RIGHT_OR_WRONG,
            )
            for rank, (name, more) in enumerate(self.found)
        )

    def ask(self, opened: OpenedModel, items: Sequence[Item], progress: Progress | None = None) -> Answers:
        require_speaker(opened)
        lm_eval = _package()
        from lm_eval.models.huggingface import HFLM

        module: Any = opened.module
        asked = [int(item.id.rpartition("#")[2]) for item in items]
        result = lm_eval.simple_evaluate(
            model=HFLM(pretrained=module, tokenizer=opened.tokenizer, batch_size=self.batch_size),
            tasks=[self.harness],
            num_fewshot=self.shots,
            samples={self.harness: asked},
            task_manager=_manager(self.include_path),
            apply_chat_template=self.chat_template,
            log_samples=True,
            bootstrap_iters=0,
            verbosity="ERROR",
            **SEEDS,
        )
        if progress:
            progress(len(items), len(items))
        rows = self._rows(result["samples"][self.harness], asked)
        columns = {name: np.array([float(row[name]) for row in rows]) for name, _ in self.found}
        nothing = np.full(len(items), np.nan)
        first, more = self.found[0]
        tokens = self.tokens(opened, items)
        said = tuple(str(row.get("filtered_resps", ""))[:200] for row in rows)
        return Answers(columns, said, nothing, columns[first] * (1 if more else -1), tokens)

    def _rows(self, samples: Sequence[dict[str, Any]], asked: Sequence[int]) -> list[dict[str, Any]]:
        """One row per document, of the first filter where there are several."""
        rows: dict[int, dict[str, Any]] = {}
        for sample in samples:
            rows.setdefault(int(sample["doc_id"]), sample)
        missing = [number for number in asked if number not in rows]
        if missing:
            raise DataError(f"lm-eval gave no result for document {missing[0]} of {self.harness!r}.")
        return [rows[number] for number in asked]

    def probes(self, opened: OpenedModel, items: Sequence[Item]) -> list[Question]:
        """None: the package makes its prompts by itself."""
        return []

    def tokens(self, opened: OpenedModel, items: Sequence[Item]) -> int:
        """A quarter of the documents' characters: what the package makes of them is its own matter."""
        return sum(len(str(item.prompt)) for item in items) // 4


def harness_task(spec: str, *, limit: int | None = None) -> Harness:
    """The task behind `lm-eval:name[:shots=2:include_path=FOLDER]`.

    Raises:
        UsageError: The package is missing, or has no such task.
        DataError: Its documents cannot be read.
    """
    from .builtin import _settings

    name, settings = _settings(spec)
    unknown = sorted(settings.keys() - {"shots", "include_path", "batch_size"})
    if unknown:
        raise UsageError(f"A task of lm-eval has no setting {unknown[0]!r} here.", hint="shots, include_path")
    _package()
    task = _load(name, settings.get("include_path"))
    documents = list(task.eval_docs)[: limit or None]
    averaged = [
        (metric, bool(task.higher_is_better().get(metric, True)))
        for metric, function in task.aggregation().items()
        if getattr(function, "__name__", "") == "mean"
    ]
    if not averaged:
        raise DataError(f"The lm-eval task {name!r} has no metric that is a mean over documents.")
    items = tuple(
        Item(f"{name}#{i}", json.dumps(document, ensure_ascii=False, sort_keys=True, default=str))
        for i, document in enumerate(documents)
    )
    return Harness(name=name, items=items, harness=name, found=tuple(averaged), **settings)


def _package() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise UsageError(
            "Tasks of lm-eval need the package, which is not installed.", hint="pip install 'sinklens[eval]'"
        ) from error
    return lm_eval


def _manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _load(name: str, folder: str | None) -> Any:
    from lm_eval.tasks import get_task_dict

    from sinklens.core.suggest import did_you_mean

    manager = _manager(folder)
    if name not in manager.all_subtasks:
        raise UsageError(
            f"lm-eval has no task {name!r}.",
            detail=did_you_mean(name, manager.all_subtasks),
            hint="Groups of tasks are several tasks: name each.",
        )
    try:
        return get_task_dict([name], manager)[name]
    except Exception as error:  # datasets, hubs and task files fail in ways of their own
        raise DataError(
            f"The documents of the lm-eval task {name!r} cannot be read: {str(error).splitlines()[0][:200]}",
            hint="Without the network they must be in the local cache of datasets.",
        ) from error
