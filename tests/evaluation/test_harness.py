"""Tasks of lm-eval on a patched model. They run where the package is installed; without it there is a clear message."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sinklens.core.errors import UsageError
from sinklens.evaluation.tasks import read_task
from sinklens.mitigations import KnockOut
from sinklens.models.opening import open_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """
task: toy_copy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_message_says_how_to_get_it() -> None:
    with pytest.raises(UsageError, match=r"sinklens\[eval\]"):
        read_task("lm-eval:hellaswag", open_model("bundled:dense-ind"))


@pytest.mark.skipif(not INSTALLED, reason="needs lm-eval")
@pytest.mark.filterwarnings("default")
def test_the_package_asks_the_model_as_it_is_now(tmp_path: Path) -> None:
    opened = open_model("bundled:dense-ind")
    words = ["moss", "tide", "bread", "salt", "fern", "shell"]
    rows = [
        {"prompt": f"{a} {b} again {a} {b} again", "choices": [b, a, "Anna"], "answer": 0}
        for a in words
        for b in words
        if a != b
    ]
    data = tmp_path / "toy.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.format(path=data, cache=tmp_path / "cache"))
    task = read_task(f"lm-eval:toy_copy:include_path={tmp_path}", opened)
    assert [metric.name for metric in task.metrics] == ["acc"]
    _, report = task.split(calibration=10)
    plain = task.ask(opened, report.items)
    assert len(plain.columns["acc"]) == 20
    assert plain.columns["acc"].mean() > 0.5
    with torch.no_grad(), KnockOut(positions=(1, 2, 3, 4, 5))(opened) as effect:
        edited = task.ask(opened, report.items)
    assert effect.acted
    assert edited.columns["acc"].mean() < plain.columns["acc"].mean()
    assert np.array_equal(task.ask(opened, report.items).columns["acc"], plain.columns["acc"])
