"""A finding without anything to show is a sentence, never an empty plot: over every analyzer."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from sinklens.analyzers import Status, registry
from sinklens.report import render_report
from sinklens.tracers.trace import Trace
from tests.analyzers.made import record, trace

from . import factory


def without_prompts() -> Trace:
    made = trace([record(np.full((2, 3, 5, 5), 0.2))])
    return replace(made, records=[])


@pytest.mark.parametrize("name", [name for name, _ in registry.items()])
def test_without_prompts_there_is_a_reason_and_no_plot(name: str) -> None:
    finding = registry[name]().read(without_prompts())
    assert finding.status is Status.NOT_APPLICABLE
    run = factory.make()
    run.document["findings"] = {name: finding.to_json()}
    html = render_report(run.document, {name: finding.figures}, finding.tiles, [], [])
    section = html[html.index(f'<section class="part" id="{name}">') :]
    section = section[: section.index("</section>")]
    assert "<svg" not in section
    said = re.search(r'<p class="none">Not applicable: ([^<]+)</p>', section)
    assert said is not None
    assert len(said[1].strip()) > 10
    assert said[1].strip().endswith(".")


@pytest.mark.parametrize("name", [name for name, _ in registry.items()])
def test_nothing_found_is_a_sentence(name: str) -> None:
    """With no rows and no figures, as a run without anything of the kind has it."""
    cls = registry[name]
    finding = cls().finding(Status.NOT_FOUND, f"Nothing of {cls.title} was found.")
    run = factory.make()
    run.document["findings"] = {name: finding.to_json()}
    html = render_report(run.document, {name: []}, [], [], [])
    section = html[html.index(f'<section class="part" id="{name}">') :]
    section = section[: section.index("</section>")]
    assert "<svg" not in section
    assert "<figure" not in section
    assert f'<p class="lead">Nothing of {cls.title} was found.</p>' in section
    assert "The table is empty: nothing met this method&#39;s criterion." in section.replace("'", "&#39;")
