"""Every Python example of the README runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert BLOCKS


def test_commands_named_in_the_readme_exist() -> None:
    from sinklens.cli.main import app

    names = {command.name for command in [*app.registered_commands, *app.registered_groups]}
    used = set(
        re.findall(r"sinklens (\w+)", "\n".join(re.findall(r"```bash\n(.*?)```", README.read_text(), re.S)))
    )
    assert used <= names
