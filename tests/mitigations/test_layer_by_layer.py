"""Methods on pictures equal their definitions to 1e-6, layer by layer, on every class of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.kernels.key_sets import Gains, KeySets
from sinklens.kernels.spec import AttentionCall
from sinklens.kernels.transfer import transfer
from sinklens.mitigations import PAI, VAR, SinkGating, ZeroTuning
from sinklens.tracers.attention import Site

from ..families import IMAGE
from .dense import full_map, mixed
from .layerwise import CLASSES, held_against, logits_of, reader, softmax_of, visual_of
from .test_stack import watched
from .test_var import DIMS, TAU, Oracle
from .test_visual_gates import GateOracle
from .test_with import logits


def of_map(oracle: Any) -> Any:
    """The definition of a call from one of its map."""
    return lambda site, call: mixed(oracle(site, full_map(call)), call)


ON_SINKS = {
    "var": (Oracle, VAR(dims=DIMS, tau=TAU, rho=0.2, floor=0.05)),
    "var-code": (Oracle, VAR(dims=DIMS, tau=TAU, rho=0.9, floor=0.05, p=0.3, recipe="code")),
    "sink-gating": (GateOracle, SinkGating(sink=0.3, rest=2.5, dims=DIMS, tau=TAU)),
}
# Where no visual token is a sink the program does nothing.
WITHOUT = {"var-code": ("gpt2", "llama", "mistral", "gpt_oss")}


@pytest.mark.parametrize(
    ("family", "case"),
    [(family, case) for case in ON_SINKS for family in CLASSES if family not in WITHOUT.get(case, ())],
)
def test_sinks_of_pictures(family: str, case: str) -> None:
    oracle: Any
    oracle, mitigation = ON_SINKS[case]
    model, given = reader(family, batch=3)
    rewriting = oracle(model, given, mitigation)
    with (
        rewriting,
        mitigation(model) as effect,
        held_against(model, rewriting.real, of_map(rewriting)) as apart,
    ):
        logits(model, given)
    assert max(apart.values()) > 1e-3
    assert effect.acted


def raised_call(call: AttentionCall, gain: Tensor) -> Tensor:
    """`z + gain |z|` `[batch query key]` before the softmax."""
    z, sink = logits_of(call)
    raised = z + torch.where(torch.isfinite(z), gain[:, None] * z.abs(), 0.0)
    return mixed(softmax_of(raised, sink), call)


def last_rows(real: Tensor, first: int | None = None) -> Tensor:
    """The last real token of each prompt; with `first`, all from the one before that place on."""
    rows = torch.zeros_like(real)
    for row, own in enumerate(real):
        rows[row, int(own.nonzero()[-1]) if first is None else first - 1 :] = True
    return rows & real


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", CLASSES)
def test_pai(family: str, padding: str) -> None:
    if family in ("gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl") and padding == "right":
        pytest.skip("their pictures are placed for generation, which pads on the left")
    model, given = reader(family, batch=3, padding=padding)
    real, visual = given["attention_mask"] != 0, visual_of(given)
    gain = 0.7 * (last_rows(real)[:, :, None] & visual[:, None]).double()

    def definition(site: Site, call: AttentionCall) -> Tensor:
        return raised_call(call, gain if site.layer in (1, 2) else 0 * gain)

    with (
        PAI(alpha=0.7, start=1, end=3)(model) as effect,
        held_against(model, real, definition) as apart,
    ):
        logits(model, given)
    assert apart[0] == apart[3] == 0.0
    # A window may have lost the picture.
    assert max(apart[1], apart[2]) > 1e-3 or family in ("mistral", "gemma3_text")
    assert effect.acted == (max(apart[1], apart[2]) > 0)


def call_of(strength: float, rows: int = 5, offset: float = 0.0) -> AttentionCall:
    """Logits of any size; the first row sees one key."""
    torch.manual_seed(3)
    query, key = torch.randn(2, 4, rows, 6), strength * torch.randn(2, 2, 13, 6)
    mask = torch.full((2, 1, rows, 13), offset)
    mask[:, :, 0, 1:] = -torch.inf
    sinks = None if offset else torch.tensor([0.0, -1.0, 2.0, 4.0])
    return AttentionCall(query, key, torch.randn(2, 2, 13, 3), 1.0, mask=mask, learned_sinks=sinks)


def raising(call: AttentionCall, alpha: float, **more: Any) -> Any:
    """Keys 2, 3, 7 and 11 raised in all rows, by the transfer, from the exact output of the call."""
    columns = torch.tensor([2, 3, 7, 11])[None, None, :, None].expand(2, -1, -1, -1)
    sets = KeySets(columns, torch.ones_like(columns, dtype=torch.bool))

    def rule(shares: Any) -> Gains:
        gains = alpha * shares.logits.abs()
        return Gains(gains, torch.ones_like(gains[..., 0], dtype=torch.bool))

    return transfer(call, mixed(full_map(call), call), sets, rule, logits=True, **more)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 3.0, 1e3, 1e12])
@pytest.mark.parametrize(("strength", "offset"), [(1.0, 0.0), (100.0, 0.0), (100.0, -4000.0)])
def test_no_strength_is_too_large(alpha: float, strength: float, offset: float) -> None:
    """Factors of exp(1e14) and weights of exp(-1e3) make no row that is left alone, and none that is not a number."""
    given = vars(call_of(strength, offset=offset))
    wide: dict[str, Any] = {k: v.double() if isinstance(v, Tensor) else v for k, v in given.items()}
    call = AttentionCall(**wide)
    gain = torch.zeros(2, 5, 13).double()
    gain[..., [2, 3, 7, 11]] = alpha
    done = raising(call, alpha)
    truth = raised_call(call, gain)
    torch.testing.assert_close(done.output, truth, rtol=0, atol=1e-9)
    assert int(done.rows) == (0 if alpha == 0.0 else 2 * 4 * 4)
    if alpha == 0.0:
        assert torch.equal(done.output, mixed(full_map(call), call))


def test_a_map_that_no_factor_tells_is_refused_and_others_are_told() -> None:
    told = raising(call_of(1.0), 0.5, remember=True)
    assert told.edit is not None
    lost = call_of(100.0, offset=-4000.0)
    with pytest.raises(UsageError, match="a key without any weight gets one"):
        raising(lost, 1e3, remember=True)


def test_a_trace_sees_what_pai_made_and_pai_what_was_before() -> None:
    """On top of another mitigation: shares are those it left, and a sweep measures both."""
    from dataclasses import replace

    from sinklens.kernels.spec import Stat

    model, given = reader("llama")
    real, visual = given["attention_mask"] != 0, visual_of(given)
    rows = last_rows(real)
    seen = []

    def check(site: Site, call: AttentionCall, found: Any) -> None:
        z, sink = logits_of(replace(call, edits=()))
        first = real.int().argmax(1)
        for row in range(len(real)):
            z[row, :, int(first[row]) + 1 :, int(first[row])] += torch.log(torch.tensor(3.0)).double()
        plain = logits_of(replace(call, edits=()))[0]
        gain = 0.7 * (rows[:, :, None] & visual[:, None]).double() * (site.layer > 0)
        z = z + torch.where(torch.isfinite(plain), gain[:, None] * plain.abs(), 0.0)
        truth = torch.where(real[:, None, :, None], softmax_of(z, sink), 0.0).sum(2)
        torch.testing.assert_close(found[Stat.RECEIVED].double(), truth, rtol=0, atol=2e-5)
        seen.append(site.layer)

    with (
        ZeroTuning(gamma=3.0)(model),
        PAI(alpha=0.7, start=1)(model) as effect,
        watched(model, real, check),
    ):
        logits(model, given)
    assert effect.acted
    assert seen == [0, 1, 2, 3]
    assert IMAGE in given["input_ids"]
