"""What the terminal says while a run goes on."""

from __future__ import annotations

import pytest

from sinklens.cli.console import STAGES, ConsoleListener


@pytest.mark.parametrize("name", [*STAGES, "one-word"])
def test_every_stage_can_be_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleListener().stage(name)
    said = capsys.readouterr().err
    assert STAGES.get(name, name).split()[0] in said
