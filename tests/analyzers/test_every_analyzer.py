"""What every registered analyzer owes its readers; a new one that lacks something fails here."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import cast

import pytest

from sinklens.analyzers import Analyzer, Status, chosen_analyzers, registry
from sinklens.core.errors import UsageError
from sinklens.models.spec import ModelInfo
from sinklens.pipeline.methods import docstring_sections, first_line
from sinklens.report.mathml import formula
from sinklens.tracers.signals import ALL_SIGNALS
from sinklens.tracers.trace import LayerInfo, Trace

HERE = Path(__file__).parent
EVERY = [cls for _, cls in registry.items()]
every = pytest.mark.parametrize("cls", EVERY, ids=[cls.name for cls in EVERY])


def text_of_tests(cls: type[Analyzer]) -> str:
    """The text of the test file of an analyzer's module."""
    path = HERE / f"test_{cls.__module__.rpartition('.')[2]}.py"
    assert path.is_file(), f"{cls.name} has no golden tests: {path.name}"
    return path.read_text(encoding="utf-8")


def empty(**layer: bool) -> Trace:
    """A trace of a dense model without prompts."""
    kinds = {"attention": True, "down_proj": True, "experts": False, "shared_expert": False, **layer}
    layers = tuple(LayerInfo(i, residual="block output", **kinds) for i in range(3))
    return Trace(ModelInfo("example/empty", None, "made", 3, 2, 2, 8, 0, "float32"), layers, [])


@every
def test_it_says_where_it_comes_from(cls: type[Analyzer]) -> None:
    reference = cls.reference
    assert reference.section, "the section or table of the definition"
    assert reference.title
    assert reference.authors
    assert reference.url.startswith("https://")
    assert re.fullmatch(r"\d{4}\.\d{5}", reference.arxiv) or reference.code
    assert reference.key in reference.bibtex


@every
def test_it_says_what_it_does_and_when_not_to_trust_it(cls: type[Analyzer]) -> None:
    assert first_line(cls).endswith(".")
    for name, said in docstring_sections(cls).items():
        assert len(said.split()) >= 12, f"{cls.name}: {name} is missing or says too little: {said!r}"
    assert "<math" in formula(cls.formula)


@every
def test_paper_and_code_are_told_apart(cls: type[Analyzer]) -> None:
    """Where the two differ there is a recipe; elsewhere the docstring says what is known of the code."""
    said = docstring_sections(cls)["compared"]
    recipes = {f.name: f.default for f in fields(cls)}.get("recipe")  # type: ignore[arg-type]
    if recipes is None:
        assert re.search(r"\bcode\b|\bprogram\b|\bprofiler\b|\brepository\b", said), said
        return
    documentation = inspect.getdoc(cls) or ""
    assert re.search(r'recipe="|recipe=|`paper`|recipe:', documentation)
    other = "code" if recipes == "paper" else "paper"
    make = cast(Callable[..., Analyzer], cls)
    assert make(recipe=other).parameters["recipe"] == other
    with pytest.raises(UsageError, match="recipe"):
        make(recipe="neither")


@every
def test_it_is_a_frozen_method_with_known_needs(cls: type[Analyzer]) -> None:
    assert is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert cls.needs <= frozenset(ALL_SIGNALS)
    assert all(f.default is not None or f.name for f in fields(cls))  # type: ignore[arg-type]
    assert cls() == cls(**cls().parameters)
    assert isinstance(cls.default, bool)


@every
@pytest.mark.parametrize("attention", [True, False])
def test_it_says_why_it_does_not_apply(cls: type[Analyzer], attention: bool) -> None:
    finding = cls().analyze(empty(attention=attention))
    assert finding.status is Status.NOT_APPLICABLE
    assert finding.reason
    assert finding.reason.rstrip().endswith("."), "a sentence"
    assert finding.verdict.startswith("Not applicable: ")
    assert not finding.rows


@every
def test_its_states_are_tested(cls: type[Analyzer]) -> None:
    text = text_of_tests(cls)
    assert re.search(r"NOT_APPLICABLE|not-applicable|not applicable|\.reason", text), (
        "the not applicable state"
    )
    assert cls.__name__ in text
    assert re.search(r"^def test_", text, flags=re.MULTILINE)


def test_places_order_the_chain() -> None:
    places = [cls.place for cls in EVERY]
    assert len(set(places)) == len(places)
    asked = [analyzer.place for analyzer in chosen_analyzers("all")]
    assert asked == sorted(asked)
    assert len(asked) == len(EVERY)
    assert [a.name for a in chosen_analyzers(())] == [
        cls.name for cls in sorted(EVERY, key=lambda cls: cls.place) if cls.default
    ]
