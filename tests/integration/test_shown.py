"""What a run shows in a notebook and exports for papers, with pictures: from traces made by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sinklens as sl
from sinklens.analyzers import VisualSinks
from sinklens.core.errors import UsageError
from sinklens.inputs.spans import Picture
from sinklens.mitigations.edits import Edits
from sinklens.mitigations.effect import Effect
from sinklens.mitigations.knock_out import KnockOut
from sinklens.models.opening import open_model
from sinklens.pipeline.run import Run
from sinklens.tracers.selfcheck import Check
from tests.analyzers.made_pictures import LAYERS, LENGTH, made, phi_record
from tests.report.parsed import Page

HOSTILE = '"><img src=x onerror=alert(1)>.png'


@pytest.fixture
def run() -> Run:
    records = [phi_record(0, {(3, 4): 31.0, (3, 8): 22.0}), phi_record(1, {})]
    rng = np.random.default_rng(3)
    for record in records:
        assert record.spans is not None
        pixels = rng.integers(0, 256, (20, 40, 3), dtype=np.uint8)
        ref = Picture(HOSTILE, 40, 20, f"{record.index}" * 64)
        record.spans = replace(record.spans, pictures=(ref,))
        record.arrays["thumbnail_0"] = pixels
        record.arrays["attention_received_mean"] = np.full((LAYERS, LENGTH), 0.1, dtype=np.float32)
        record.arrays["attention_received_mean"][:, 0] = 0.7
    return Run(made(records), (VisualSinks(),), [Check("logits unchanged", True, 0.0, 0.0, "")])


def static(html: str) -> Page:
    page = Page(html)
    assert len(html) < 100_000
    assert {tag for tag, _ in page.elements} <= {
        "div", "span", "strong", "img", "table", "thead", "tbody", "tr", "th", "td", "br",
    }  # fmt: skip
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    sources = page.attributes("src")
    assert all(source.startswith("data:image/") for source in sources)
    return page


def test_the_report_has_the_pictures(run: Run, tmp_path: Path) -> None:
    html = run.report(tmp_path / "r.html").read_text(encoding="utf-8")
    assert html.count('<image id="picture-') == 2
    assert "onerror=alert(1)>" not in html.replace("&gt;", "")
    page = Page(html)
    assert "Attention sticks to 2 of 8 patches" in page.words
    bare = run.report(tmp_path / "b.html", include_text=False).read_text(encoding="utf-8")
    assert '<image id="picture-' not in bare
    assert "onerror" not in bare
    assert "picture 000000000000" in bare
    loaded = sl.load(tmp_path / "r.html")
    assert isinstance(loaded, dict)
    assert loaded["findings"]["visual-sinks"]["rows"] == run.document["findings"]["visual-sinks"]["rows"]


def test_a_picture_in_a_notebook(run: Run) -> None:
    shown = run.picture(prompt=0, image=0)
    page = static(shown._repr_html_())
    assert repr(shown).startswith(
        "Visual sinks on their pictures, layer 3: prompt 0, picture 0. Attention sticks to 2"
    )
    assert "○ visual sink × 2" in page.words
    assert len(page.attributes("src")) == 4  # the sinks, attention before and after, φ
    assert HOSTILE in page.words


def test_without_a_finding_the_attention_received_is_shown(run: Run) -> None:
    bare = Run(run.trace, (), run.checks, None, {})
    page = static(bare.picture(1).html)
    assert "Attention received by each patch per query that sees it" in page.words
    assert "pale 0 to dark 0.1 share" in page.words
    for record in bare.trace:
        record.arrays.pop("attention_received_mean")
    assert "Attention was not recorded." in static(bare.picture(1).html).words


def test_a_prompt_in_a_notebook(run: Run) -> None:
    page = static(run.view(prompt=0).html)
    assert "[tokens 1 to 8: picture]" in page.words
    assert "token 0: 0.7" in page.attributes("title")
    assert "Attention sticks to 2 of 8 patches" in page.words
    assert repr(run.view(0)) == "Prompt 0, made:0: 13 tokens"


def test_findings_draw_themselves(run: Run, tmp_path: Path) -> None:
    finding = run.visual_sinks
    page = static(finding._repr_html_())
    assert "Visual sinks" in page.words
    assert finding.plot().to_dict()["layout"]["images"]
    assert finding.plot("counts").to_dict()["data"]
    assert finding.draw("patches", picture=1).get_suptitle() == "Visual sinks on their pictures, layer 3"
    with pytest.raises(UsageError, match="Visual sinks has no figure 'count'") as caught:
        finding.plot("count")
    assert "counts" in str(caught.value)
    with pytest.raises(UsageError, match="has no picture 7"):
        finding.plot(picture=7)
    written = sl.export(run, "figures", tmp_path / "f", kind="svg")
    names = {path.name for path in written}
    assert {"visual-sinks-patches-prompt0-picture0.svg", "visual-sinks-patches-prompt1-picture0.svg"} <= names
    drawn = (tmp_path / "f" / "visual-sinks-patches-prompt0-picture0.svg").read_text(encoding="utf-8")
    assert len(re.findall("<image", drawn)) == 7  # four panels with the picture, three colour bars
    bare = sl.export(run, "figures", tmp_path / "g", kind="svg", include_text=False)
    text = next(path for path in bare if "prompt0" in path.name).read_text(encoding="utf-8")
    assert len(re.findall("<image", text)) == 6  # the panel of the classes alone has no image now


def test_what_is_not_there_is_said(run: Run) -> None:
    with pytest.raises(UsageError, match="The run has no prompt 9") as caught:
        run.view(9)
    assert "It has 2: 0 to 1." in str(caught.value)
    with pytest.raises(UsageError, match="Prompt 0 has no picture 1"):
        run.picture(0, 1)
    with pytest.raises(UsageError, match="'visual-sink' draws nothing on this picture") as caught:
        run.picture(0, 0, finding="visual-sink")
    assert "visual-sinks" in str(caught.value)
    for record in run.trace:
        record.spans = None
    with pytest.raises(UsageError, match="It is text alone"):
        run.picture(0, 0)
    text = run.analyze("visual-sinks")
    with pytest.raises(UsageError, match="Visual sinks has nothing to draw"):
        text.visual_sinks.plot()


def test_traces_show_what_they_hold(run: Run) -> None:
    page = static(run.trace._repr_html_())
    assert "phi" in page.words
    assert "2 prompts" in page.words
    static(run._repr_html_())


def test_a_mitigation_run_and_its_effects_show_themselves(tmp_path: Path) -> None:
    given: dict[str, Any] = {"n": 2, "n_items": 6, "verify": False}
    found = sl.mitigate("bundled:dense-ind", "knock-out", **given)
    page = static(found._repr_html_())
    assert "knock-out" in page.words
    assert found.recommendation["text"] in page.words
    static(found.trace._repr_html_())
    for finding in found.findings.values():
        assert finding.title in static(finding._repr_html_()).words
    for run in found.after.values():
        static(run._repr_html_())
    loaded = sl.load(found.save(tmp_path / "run"))
    assert isinstance(loaded, sl.Run)
    static(loaded._repr_html_())


@pytest.mark.parametrize("kind", [Effect, Edits])
def test_an_effect_that_did_nothing_says_so(kind: Any) -> None:
    page = static(kind(HOSTILE, calls=1)._repr_html_())
    assert "It did not act; there is no effect to report." in page.words
    assert HOSTILE in page.words


def test_an_effect_shows_itself() -> None:
    assert "1 attention call was seen" in Effect("any", calls=1).verdict
    assert "2 attention calls were seen" in Effect("any", calls=2).verdict
    opened = open_model("bundled:dense-ind")
    with torch.no_grad(), KnockOut()(opened) as effect:
        opened.module(input_ids=torch.arange(4, 40)[None])
    assert effect.acted
    assert effect.verdict in static(effect._repr_html_()).words
