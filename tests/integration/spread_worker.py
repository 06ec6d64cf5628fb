"""Run by torchrun in `test_tensor_parallel.py`: models spread over the processes, traced by all of them in step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinklens.core.errors import ModelError
from sinklens.models.fingerprint import weights_hash
from sinklens.models.opening import open_model
from sinklens.models.spread import spreading
from sinklens.pipeline.profile import profile
from sinklens.tracers.executor import TracePlan, trace
from sinklens.tracers.selfcheck import self_check
from sinklens.tracers.store import packed
from sinklens.tracers.team import joined
from tests.integration.spread_cases import ANALYZERS, BUNDLED, CASES, TEXTS, plan_of, prompts


def found(folder: Path, name: str, size: int) -> dict[str, Any]:
    """What is measured on one model, besides its records, which go into a file."""
    opened = open_model(str(folder / name), dtype="fp32", tokenizer=object(), spread=size)
    checks = self_check(opened, prompts(), TracePlan())
    result = trace(opened, prompts(), plan_of(name))
    said = opened.spread.agree("records", packed(result.records)) if opened.spread else []
    if dist.get_rank() == 0:
        (folder / f"{name}.records").write_bytes(said[0])
    return {
        "checks": [check.name for check in checks],
        "failed": [check.to_json() for check in checks if not check.passed],
        "same_everywhere": all(other == said[0] for other in said),
        "tracing": result.tracing,
        "weights": weights_hash(opened.module),
        "for_one": refused(opened.module),
    }


def refused(module: Any) -> str:
    """What is said where a whole model is needed."""
    try:
        open_model(module)
    except ModelError as error:
        return str(error)
    return ""


def profiled(folder: Path, size: int) -> dict[str, Any]:
    """A caller's own model, profiled by all processes."""
    model = AutoModelForCausalLM.from_pretrained(
        BUNDLED, dtype=torch.float32, distributed_config=spreading(size)
    )
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    run = profile(model, tokenizer=tokenizer, prompts=TEXTS, out=folder / "run", analyzers=ANALYZERS)
    other = [TEXTS[:1], TEXTS][dist.get_rank()]
    try:
        profile(model, tokenizer=tokenizer, prompts=other, analyzers=ANALYZERS)
        said = ""
    except ModelError as error:
        said = str(error)
    return {
        "folder": None if run.folder is None else str(run.folder),
        "findings": run.document["findings"],
        "processes": run.document["manifest"]["processes"],
        "different": said,
    }


def run(folder: Path) -> None:
    with joined() as team:
        results = {name: found(folder, name, team.size) for name in CASES}
        results["profiled"] = team.agree("profiled", profiled(folder, team.size))  # type: ignore[assignment]
        if team.leads:
            (folder / "found.json").write_text(json.dumps(results), encoding="utf-8")


run(Path(sys.argv[1]))
