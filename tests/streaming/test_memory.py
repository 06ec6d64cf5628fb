"""Running out of memory is told in words, and streaming is named where it is possible and not on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sinklens
from sinklens.core.errors import ModelError, OutOfMemory
from sinklens.models import streamable
from sinklens.models.opening import open_model

from .cases import saved

FEW: dict[str, Any] = {"n": 2, "seq_len": 16, "analyzers": ("massive-activations",), "verify": False}


def _held(folder: Path) -> Path:
    return saved("llama", folder)


def _short(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("where", ["opening", "checking", "running"])
def test_streaming_is_named_where_memory_is_short(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    from sinklens.pipeline import prepare, session
    from sinklens.tracers import executor

    place = {
        "opening": (prepare, "forward"),
        "checking": (session, "checked_plan"),
        "running": (executor, "collate"),
    }
    monkeypatch.setattr(*place[where], _short)
    with pytest.raises(OutOfMemory, match="Out of memory") as caught:
        sinklens.profile(str(_held(tmp_path / "a")), **FEW)
    assert caught.value.hint is not None
    assert "--stream on" in caught.value.hint
    assert "--resume" not in caught.value.hint  # takes no other options
    assert ("saved" in str(caught.value)) is False  # there is no folder
    # Not for what cannot be streamed, or is already.
    monkeypatch.setattr(
        streamable, "refuse_unstreamable_format", lambda *_: (_ for _ in ()).throw(ModelError("packed"))
    )
    with pytest.raises(OutOfMemory) as caught:
        sinklens.profile(str(tmp_path / "a"), **FEW)
    assert "--stream" not in str(caught.value)
    with pytest.raises(OutOfMemory) as caught:
        sinklens.profile(open_model(str(tmp_path / "a")), **FEW)
    assert "--stream" not in str(caught.value)


def test_a_streamed_run_is_not_told_to_stream(tmp_path: Path, monkeypatch: Any) -> None:
    from sinklens.pipeline import session

    monkeypatch.setattr(session, "checked_plan", _short)
    with pytest.raises(OutOfMemory) as caught:
        sinklens.profile(str(_held(tmp_path)), stream="on", **FEW)
    assert "--stream on" not in str(caught.value)
