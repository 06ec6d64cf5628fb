"""Every code block of README and docs runs, offline, and leaves nothing outside its folder; links lead somewhere.

A page's Python blocks run one after the other, as a reader would run them. One that cannot run here says why in a
comment before it, `<!-- not run in the tests: reason -->`. Commands are parsed, with every option and value; those that
only list something are run.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

import sinklens.kernels.transfer  # noqa: F401  # brings beartype in before nnsight changes `object`
from sinklens.cli.main import app, main
from sinklens.models.catalog import bundled

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(
    r"(?:<!-- not run in the tests: (.*?) -->\s*)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A block of code with its language; `reason` is why it is not run."""

    language: str
    code: str
    reason: str


def blocks(page: str, language: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(kind, code, reason) for reason, kind, code in _BLOCK.findall(text)]
    return [block for block in found if block.language == language]


def commands(page: str) -> list[str]:
    """Command lines of `sinklens` without comments, pipes and the environment before them."""
    lines = [line for block in blocks(page, "bash") for line in block.code.replace("\\\n", " ").splitlines()]
    plain = [line.split(" #")[0].split(" | ")[0].strip() for line in lines]
    found = (re.search(r"(?:^|/|\s)sinklens\s+(.*)$", line) for line in plain if not line.startswith("make "))
    return [match[1] for match in found if match]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
LINES = [(page, line) for page in ("README.md", *PAGES) for line in commands(page)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be, with a text file of their own."""
    monkeypatch.chdir(tmp_path)
    own = (bundled()["dense-ind"] / "sinklens_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "prompts.txt").write_text("\n".join(json.loads(line)["text"] for line in own[:8]), "utf-8")
    return tmp_path


@pytest.mark.filterwarnings("ignore:::(?!sinklens)")  # those of the libraries shown
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run_in_order(page: str, folder: Path) -> None:
    held: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python")):
        if not block.reason:
            file = folder / f"block_{number}.py"  # nnsight reads the source of its `with` blocks
            file.write_text(block.code, encoding="utf-8")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.code, str(file), "exec"), held)


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}-{line[:40]}" for page, line in LINES])
def test_commands_parse(page: str, line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"{page}: there is no command {name!r}"  # pyright: ignore
        command = command.commands[name]  # pyright: ignore
    command.make_context(command.name, words).close()


@pytest.mark.parametrize("line", sorted({line for _, line in LINES if re.match(r"ls |testbed list", line)}))
def test_lists_are_printed(line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)) == 0
    assert capsys.readouterr().out.count("\n") >= 2


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = [m for p in ("README.md", *PAGES) for m in re.findall(r"`?make ([a-z-]+)`?", _code(p))]
    assert named
    assert set(named) <= targets


def _code(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join([*re.findall(r"`[^`\n]+`", text), *(block.code for block in blocks(page, "bash"))])


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL))
    here = (ROOT / page).parent
    missing = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (here / path) if path else ROOT / page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index))
    assert linked == {Path(page).name for page in PAGES} - {"README.md"}


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    left_out = [b.reason for page in ("README.md", *PAGES) for b in blocks(page, "python") if b.reason]
    assert len(left_out) <= 2
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 16
