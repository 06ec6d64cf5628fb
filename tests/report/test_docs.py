"""The generated pages say what the code says, and formulas read as one line."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import sinklens
from sinklens.analyzers import registry
from sinklens.pipeline.run import Run
from sinklens.report.mathml import linear
from sinklens.tracers.signals import ALL_SIGNALS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """As for `python docs/generate.py`: what lies beside the file can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        yield


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["analyzers", "signals", "backends", "mitigations", "api"])
def test_pages_are_what_the_code_says(generate: ModuleType, page: str) -> None:
    written = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert written == getattr(generate, f"{page}_page")(), "Write the pages again: python docs/generate.py"


def test_every_analyzer_and_every_signal_has_its_place(generate: ModuleType) -> None:
    page = generate.analyzers_page()
    assert set(re.findall(r"^## (\S+)$", page, flags=re.MULTILINE)) == {name for name, _ in registry.items()}
    for _, cls in registry.items():
        assert f"[`{cls.name}`](#{cls.name})" in page
        assert cls.reference.title in page
    assert page.count("**When not to trust it.** \n") == 0
    signals = re.findall(r"^\| `(\w+)`", generate.signals_page(), flags=re.MULTILINE)
    assert sorted(signals) == sorted(signal.name for signal in ALL_SIGNALS)


def test_every_public_name_has_its_entry(generate: ModuleType) -> None:
    page = generate.api_page()
    heads = re.findall(r"^##+ (\S+)$", page, flags=re.MULTILINE)
    modules = {"analyzers", "mitigations", "nns", "tl"}
    assert {f"sl.{name}" for name in sinklens.__all__} <= set(heads)
    assert {f"sl.{name}" for name in modules} <= set(heads)
    assert {f"sl.analyzers.{cls.__name__}" for _, cls in registry.items()} <= set(heads)
    assert {f"sl.mitigations.{cls.__name__}" for _, cls in sinklens.mitigations.registry.items()} <= set(
        heads
    )
    run = page[page.index("### sl.Run\n") : page.index("### sl.Trace\n")]
    members = [name for name in vars(Run) if not name.startswith("_") and callable(vars(Run)[name])]
    assert {"analyze", "report", "save", "view"} <= set(members)
    assert all(f"#### .{name}()" in run for name in members)
    assert "epsilon: float = 0.3" in page
    assert " at 0x" not in page
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", page)


def test_tables_keep_their_columns(generate: ModuleType) -> None:
    for line in generate.signals_page().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 6, line


@pytest.mark.parametrize("name", [name for name, _ in registry.items()])
def test_formulas_of_all_analyzers_become_a_line(name: str) -> None:
    line = linear(registry[name].formula)
    assert "<" not in line.replace(" < ", "")
    assert line == " ".join(line.split())
    assert len(line) > 10


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("<math><mfrac><mn>1</mn><mrow><mi>T</mi><mo>−</mo><mi>k</mi></mrow></mfrac></math>", "1 / (T − k)"),
        ("<math><msubsup><mi>A</mi><mi>q</mi><mi>l</mi></msubsup></math>", "A_q^l"),
        ("<math><munder><mi>mean</mi><mi>q</mi></munder><mi>p</mi></math>", "mean_q p"),
        ("<math><mo>|</mo><mi>h</mi><mo>|</mo><mo>&gt;</mo><mn>3</mn></math>", "|h| > 3"),
        ("<math><mo>‖</mo><mi>q</mi><mo>‖</mo><mo>‖</mo><mi>k</mi><mo>‖</mo></math>", "‖q‖ ‖k‖"),
        ("<math><msqrt><mi>x</mi></msqrt><mi>y</mi></math>", "√(x) y"),
        ("a < b", "a < b"),
    ],
)
def test_formulas_in_one_line(source: str, line: str) -> None:
    assert linear(source) == line
