"""The house's one-way streets, and what an import may cost.

Imports go `cli -> pipeline -> {report, evaluation, mitigations, analyzers} -> tracers -> {models, inputs,
kernels} -> core`; `testbeds` stands beside the tracers. They are read from the source, so that imports inside
functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sinklens"
FILES = sorted(PACKAGE.rglob("*.py"))

LOWER = {"core", "kernels", "inputs", "models"}
MIDDLE = {*LOWER, "tracers", "testbeds"}
UPPER = {*MIDDLE, "analyzers", "evaluation", "mitigations", "report"}
# What each room may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "inputs": {"core"},
    "models": {"core"},
    "testbeds": {"core", "inputs", "models"},
    "tracers": {"core", "inputs", "kernels", "models"},
    "analyzers": {"core", "kernels", "inputs", "tracers"},
    "mitigations": {"core", "kernels", "inputs", "models", "tracers"},
    "evaluation": {"core", "inputs", "models", "tracers", "testbeds"},
    "report": {"core"},
    "checkpoints": set(),
    "pipeline": UPPER,
    "cli": {*UPPER, "pipeline"},
    "__init__": {*UPPER, "pipeline"},
    "__main__": {"cli"},
}
# Libraries that a room must not import at all, not even inside a function.
FORBIDDEN = {
    "kernels": {"transformers", "datasets", "accelerate"},
    "core": {"torch", "transformers", "datasets"},
    "report": {"torch", "transformers"},
    "analyzers": {"torch", "transformers"},
}
# Libraries too slow for the top of a module; they belong into the function that needs them.
SLOW = {"transformers", "datasets", "plotly", "matplotlib", "pandas", "transformer_lens", "nnsight", "scipy"}


def room(path: Path) -> str:
    """The part of the house a file belongs to: its folder below `sinklens`, or its name at the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Full dotted names of the modules a tree imports; relative ones are resolved."""
    home = ("sinklens", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in imported(ast.parse(path.read_text()), path)]
    return {name[1] for name in names if name[0] == "sinklens" and len(name) > 1 and is_room(name[1])}


def is_room(name: str) -> bool:
    return (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()


def at_top(tree: ast.Module, path: Path) -> set[str]:
    """First parts of what is imported when the module is: not in functions, not for type checkers only."""
    kept = ast.Module(body=[node for node in tree.body if not _deferred(node)], type_ignores=[])
    return {name.partition(".")[0] for name in imported(kept, path)}


def _deferred(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))


def ids(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(PACKAGE)) for path in paths]


def test_every_room_is_known():
    assert {room(path) for path in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_imports_go_one_way(path):
    here = room(path)
    assert rooms_imported(path) - {here} <= ALLOWED[here]


@pytest.mark.parametrize("path", FILES, ids=ids(FILES))
def test_libraries_stay_where_they_belong(path):
    tree = ast.parse(path.read_text())
    found = {name.partition(".")[0] for name in imported(tree, path)}
    assert not found & FORBIDDEN.get(room(path), set())
    assert not at_top(tree, path) & SLOW


def test_the_rules_see_a_breach(tmp_path, monkeypatch):
    """Each rule on a file that breaks it, so that none passes because it looks at nothing."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for name in ("core", "kernels", "tracers"):
        (tmp_path / name).mkdir()
    path = tmp_path / "kernels" / "bad.py"
    path.write_text(
        "from ..tracers import trace\nfrom .. import core\nimport transformers.utils\n"
        "def f():\n    import sinklens.tracers.x\n    from transformers import y\n"
    )
    tree = ast.parse(path.read_text())
    assert rooms_imported(path) == {"tracers", "core"}
    assert at_top(tree, path) == {"transformers", "sinklens"}
    path.write_text("def f():\n    from sinklens.tracers.x import y\n    import transformers\n")
    tree = ast.parse(path.read_text())
    assert rooms_imported(path) == {"tracers"}
    assert at_top(tree, path) == set()
    assert {name.partition(".")[0] for name in imported(tree, path)} == {"sinklens", "transformers"}


def loaded_by(statement: str) -> tuple[set[str], float]:
    """Top-level modules a fresh interpreter has after `statement`, and the best of three CPU times, in seconds."""
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time()\n"
        f"{statement}\n"
        "print(time.process_time() - start)\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    lines = [run.stdout.splitlines() for run in runs]
    return set(lines[0][-1].split()), min(float(line[0]) for line in lines)


def test_importing_sinklens_is_cheap():
    modules, seconds = loaded_by("import sinklens")
    assert not modules & {*SLOW, "torch", "numpy", "typer", "rich"}
    assert seconds < 0.1


def test_help_is_fast():
    """In the promised 0.4 s; CPU time, which other work on the machine hardly changes. The modules tell the rest."""
    program = "from sinklens.cli.main import run"
    modules, _ = loaded_by(program)
    assert not modules & {*SLOW, "torch"}
    code = (
        "import atexit, sys, time; sys.argv = ['sinklens', '--help']\n"
        "atexit.register(lambda: print(time.process_time(), file=sys.stderr))\n"
        f"{program}\nrun()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "profile" in done.stdout
    assert float(done.stderr.splitlines()[-1]) < 0.4


def test_importing_the_heart_changes_nothing_global():
    """An import registers nothing with transformers and changes no setting of torch or of warnings."""
    code = (
        "import torch, warnings\n"
        "from transformers import AttentionInterface\n"
        "from transformers.integrations.moe import ExpertsInterface\n"
        "def state():\n"
        "    registries = [sorted(kind().valid_keys()) for kind in (AttentionInterface, ExpertsInterface)]\n"
        "    settings = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()\n"
        "    return registries, settings, list(warnings.filters)\n"
        "before = state()\n"
        "import sinklens.tracers, sinklens.analyzers, sinklens.inputs, sinklens.kernels, sinklens.models\n"
        "assert state() == before, (before, state())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
