"""Visual sink gating and PAI equal their formulas on whole maps, padded, with and without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.spec import AttentionCall
from sinklens.mitigations import PAI, NothingEdited, SinkGating
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics
from sinklens.tracers.executor import sites

from ..families import IMAGE, LAYERS, VIDEO, build, inputs
from .dense import full_map, mixed, rewritten
from .test_methods import assert_close
from .test_var import DIMS, TAU, Oracle, sinks_of
from .test_with import logits, state

VLMS = ("llava", "qwen2_5_vl", "gemma3")
PER_LAYER = ((0.0, 0.2, 1.0, 3.0), (1.5, 1.0, 1.0, 0.4))


class GateOracle(Oracle):
    """The gates on whole maps."""

    def __call__(self, site: Site, weights: Tensor) -> Tensor:
        mitigation: Any = self.mitigation
        sink_gate, rest_gate = (
            value if isinstance(value, float) else value[site.layer]
            for value in (mitigation.sink, mitigation.rest)
        )
        sink = sinks_of(self.states[site.layer], strict=False) & self.real
        if self.prompt is not None:
            sink[:, self.prompt :] = False
        gate = torch.ones_like(sink, dtype=torch.float64)
        gate[self.visual & sink] = sink_gate
        gate[self.visual & ~sink] = rest_gate
        new = weights * gate[:, None, None]
        whole = new.sum(-1, keepdim=True) + 1.0 - weights.sum(-1, keepdim=True)  # a learned sink takes part
        rows = (self.real & ~self.visual)[:, None, :, None] & (whole > 1e-9)
        return torch.where(rows, new / whole.clamp(min=1e-300), weights)


GATES = {
    "closed": SinkGating(sink=0.0, dims=DIMS, tau=TAU),
    "both": SinkGating(sink=0.3, rest=2.5, dims=DIMS, tau=TAU),
    "per layer": SinkGating(sink=PER_LAYER[0], rest=PER_LAYER[1], dims=DIMS, tau=TAU),
    "no picture": SinkGating(sink=0.0, rest=0.0, dims=DIMS, tau=TAU),
}


@pytest.mark.parametrize("case", GATES)
@pytest.mark.parametrize("family", VLMS)
def test_gates_equal_their_formula(family: str, case: str) -> None:
    model, mitigation = build(family), GATES[case]
    given = inputs(family, batch=2, length=17, padding="left")
    oracle: Any = GateOracle(model, given, mitigation)  # type: ignore[arg-type]
    with oracle, rewritten(model, oracle, oracle.real):
        expected = logits(model, given).double()
    plain = logits(model, given)
    with mitigation(model) as effect:
        found = logits(model, given)
    assert_close(found.double(), expected, oracle.real)
    assert effect.acted
    assert not torch.allclose(found[oracle.real], plain[oracle.real], rtol=0, atol=1e-4)


def part(given: dict[str, Tensor], end: int) -> dict[str, Tensor]:
    shape = given["input_ids"].shape
    return {k: v[:, :end] if v.shape == shape else v for k, v in given.items()}


def stepwise(model: Any, given: dict[str, Tensor], prompt: int) -> Tensor:
    """Logits of the last token of the prompt and of those after it, one by one."""
    with torch.no_grad():
        out = model(**part(given, prompt), use_cache=True)
        parts = [out.logits[:, -1]]
        for at in range(prompt, given["input_ids"].shape[1]):
            out = model(
                input_ids=given["input_ids"][:, at : at + 1],
                attention_mask=given["attention_mask"][:, : at + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            parts.append(out.logits[:, -1])
    return torch.stack(parts, 1).double()


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_gates_while_it_generates(family: str) -> None:
    model, mitigation = build(family), GATES["both"]
    given = inputs(family, batch=2, length=13, padding="left")
    prompt = given["input_ids"].shape[1] - 4
    with mitigation(model):
        found = stepwise(model, given, prompt)
    oracle: Any = GateOracle(model, given, mitigation, prompt)  # type: ignore[arg-type]
    with oracle, rewritten(model, oracle, oracle.real):
        expected = logits(model, {**given, "use_cache": False}).double()  # type: ignore[dict-item]
    torch.testing.assert_close(
        found, expected[:, prompt - 1 :], rtol=0, atol=2e-5 * float(expected.abs().max())
    )


def raised_output(call: AttentionCall, visual: Tensor, alpha: float) -> Tensor:
    """Attention with `z + alpha |z|` on visual keys: by the definition A exp(alpha |z|), renormalised."""
    kv = call.query.shape[1] // call.key.shape[1]
    z = call.query.double() @ call.key.double().repeat_interleave(kv, 1).mT * call.scale
    assert call.softcap is None
    assert call.learned_sinks is None
    weights = full_map(call) * torch.exp(alpha * z.abs() * visual[:, None, None])
    return mixed(weights / weights.sum(-1, keepdim=True).clamp(min=1e-300), call)


@pytest.mark.parametrize(
    ("family", "cached"), [*((family, False) for family in VLMS), ("llava", True), ("gemma3", True)]
)
def test_pai_equals_its_formula(family: str, cached: bool) -> None:
    """The last row of the prompt, and every generated one; nothing else."""
    model, mitigation = build(family), PAI(alpha=0.7, start=1, end=3)
    given = inputs(family, batch=2, length=17, padding="left")
    ids = given["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    length = ids.shape[1]
    first = length - 4 if cached else length  # tokens of the prompt
    layers = []

    def edit(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        if site.layer not in (1, 2):
            return output
        layers.append(site.layer)
        new = output.clone()
        new[:, first - 1 :] = raised_output(call, visual, 0.7)[:, first - 1 :].to(output.dtype)
        return new

    tower = find_anatomy(model).main
    with AttentionTap(sites(model, tower, "attention"), no_statistics, ignore, edit=edit).attached(model):
        expected = logits(model, {**given, "use_cache": False}).double()  # type: ignore[dict-item]
    assert layers == [1, 2]
    plain = logits(model, given).double()
    with mitigation(model) as effect:
        found = stepwise(model, given, first)
    limit = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected[:, first - 1 :], rtol=0, atol=limit)
    assert effect.acted
    assert not torch.allclose(found, plain[:, first - 1 :], rtol=0, atol=1e-4)


def test_identities_and_what_is_refused() -> None:
    model, given = build("llava"), inputs("llava")
    plain = logits(model, given)
    before = state(model)
    for same in (SinkGating(dims=DIMS), SinkGating(sink=[1.0] * LAYERS, dims=DIMS), PAI(alpha=0.0)):
        with same(model) as effect:
            assert effect.identity
            assert torch.equal(logits(model, given), plain)
    with (
        pytest.warns(NothingEdited, match="no visual token is a sink"),
        SinkGating(sink=0.0, dims=DIMS, tau=7.9)(model),
    ):
        assert torch.equal(logits(model, given), plain)
    text = {"input_ids": torch.randint(5, 300, (1, 9))}
    for method in (SinkGating(sink=0.0, dims=DIMS, tau=TAU), PAI(start=0)):
        with pytest.warns(NothingEdited, match="no prompt has visual tokens"), method(model):
            logits(model, text)
        with pytest.raises(ModelError, match="needs a model that reads pictures"), method(build("llama")):
            pass
    with (
        pytest.raises(UsageError, match="3 gates, and the model has 4"),
        SinkGating(sink=(0.0, 1.0, 1.0), dims=DIMS)(model),
    ):
        pass
    with pytest.raises(UsageError, match="there is no layer 4"), PAI(start=4)(model):
        pass
    assert state(model) == before
    for bad in ({"sink": -1.0}, {"rest": ()}, {"sink": float("nan")}):
        with pytest.raises(UsageError):
            SinkGating(**bad)  # type: ignore[arg-type]
    for bad in ({"alpha": -0.1}, {"start": 3, "end": 3}, {"start": -1}):
        with pytest.raises(UsageError):
            PAI(**bad)  # type: ignore[arg-type]
