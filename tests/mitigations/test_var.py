"""VAR equals its formula on whole maps: which heads and rows, which sinks, who gets the budget, with a cache too."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from sinklens.core.errors import ModelError, UsageError
from sinklens.kernels.key_sets import Shares, key_sets
from sinklens.kernels.spec import AttentionCall, Stat
from sinklens.kernels.transfer import transfer
from sinklens.mitigations import VAR, NothingEdited, ZeroTuning
from sinklens.mitigations.var import redistributed
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.attention import Site

from ..families import IMAGE, LAYERS, PAD, VIDEO, build, inputs
from .dense import full_map, mixed, rewritten
from .test_methods import assert_close
from .test_stack import statistics_of, watched
from .test_with import logits, state

ROW = [0.30, 0.05, 0.10, 0.20, 0.05, 0.10, 0.05, 0.15]
DIMS, TAU = (3, 17, 40), 1.9
VLMS = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")


def golden(**parameters: Any) -> tuple[Tensor, Tensor]:
    """One row with the weights `ROW`, image keys 2 to 5, sinks at 0 (text) and 3 (visual): the map and the output."""
    mitigation = VAR(dims=(0,), **parameters)
    query, key = (
        torch.ones(1, 1, 1, 1).double(),
        torch.tensor(ROW, dtype=torch.float64).log()[None, None, :, None],
    )
    call = AttentionCall(query, key, torch.eye(8).double()[None, None], 1.0, causal=False)
    groups = torch.zeros(3, 1, 8, dtype=torch.bool)
    groups[0, 0, 0] = groups[1, 0, 3] = True
    groups[2, 0, [2, 4, 5]] = True

    def rule(shares: Shares) -> Any:
        return redistributed(
            shares,
            moved=mitigation.moved,
            least_rest=mitigation.least_rest,
            floor=mitigation.floor,
            sinks=mitigation.sinks,
            budget=mitigation.budget,
        )

    done = transfer(call, mixed(full_map(call), call), key_sets(groups), rule)
    return done.output[0, 0, 0], done.rows


def test_golden_rows() -> None:
    paper = [0.12, 0.05, 0.22, 0.08, 0.11, 0.22, 0.05, 0.15]
    code = [0.18, 0.05, 0.18, 0.12, 0.09, 0.18, 0.05, 0.15]
    for found, expected in (
        (golden(p=0.6, rho=0.5), paper),
        (golden(p=0.6, rho=0.5, recipe="code"), code),
        (golden(p=0.4, rho=0.5), code),
        (golden(p=0.6, rho=0.8), ROW),  # r = .5556 is below
        (golden(p=0.6, rho=0.5, floor=0.46), ROW),
    ):
        torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
        assert float(found[0].sum()) == pytest.approx(1.0)
        assert bool(found[1]) == (expected != ROW)


@pytest.mark.parametrize(
    ("sinks", "budget", "expected"),
    [
        ("visual", "visual", [0.30, 0.05, 0.148, 0.08, 0.074, 0.148, 0.05, 0.15]),
        ("text", "visual", [0.12, 0.05, 0.172, 0.20, 0.086, 0.172, 0.05, 0.15]),
        ("all", "text", [0.12, 0.11, 0.10, 0.08, 0.05, 0.10, 0.11, 0.33]),
        ("all", "all", [0.12, 0.08, 0.16, 0.08, 0.08, 0.16, 0.08, 0.24]),
    ],
)
def test_whose_attention_goes_where(sinks: Any, budget: Any, expected: list[float]) -> None:
    found, _ = golden(p=0.6, rho=0.5, sinks=sinks, budget=budget)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def sinks_of(state: Tensor, strict: bool) -> Tensor:
    x = state.double()
    phi = (x[..., list(DIMS)].abs() / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).amax(-1)
    return phi > TAU if strict else phi >= TAU


def dense_var(weights: Tensor, sink: Tensor, visual: Tensor, rows: Tensor, mitigation: VAR) -> Tensor:
    """The formula of the paper (`code`: with that program's parameters), on a whole map."""
    sink, vis = sink[:, None, None], visual[:, None, None]
    vs, vn = vis & sink, vis & ~sink
    moved = {"all": sink, "visual": vs, "text": sink & ~vis}[mitigation.sinks]
    target = {"visual": vn, "text": ~vis & ~sink, "all": ~sink}[mitigation.budget]
    m_v, m_n = (weights * vis).sum(-1), (weights * vn).sum(-1)
    if mitigation.recipe == "code":
        portion = (weights * vs).sum(-1) / m_v.clamp(min=1e-12)
        sel = (m_v >= mitigation.floor) & (portion <= (0.5 if mitigation.rho is None else mitigation.rho))
        sel = sel & vs.any(-1)
        p = 1 - mitigation.p
    else:
        sel = (m_v >= mitigation.floor) & (m_n / m_v.clamp(min=1e-12) >= (mitigation.rho or 0.0))
        p = mitigation.p
    m_t = (weights * target).sum(-1)
    sel = sel & (m_n > 0) & (m_t > 0) & rows[:, None]
    omega = p * (weights * moved).sum(-1)
    new = weights * (1 - p * moved.double()) + (omega / m_t.clamp(min=1e-300))[..., None] * weights * target
    return torch.where(sel[..., None], new, weights)


class Oracle:
    """Rewrites maps by the formula, with the sinks of the states that enter the blocks of its own run."""

    def __init__(
        self, model: Any, given: dict[str, Tensor], mitigation: VAR, prompt: int | None = None
    ) -> None:
        self.mitigation, self.prompt = mitigation, prompt
        ids = given["input_ids"]
        self.real = given["attention_mask"] != 0
        self.visual = ((ids == IMAGE) | (ids == VIDEO)) & self.real
        self.states: dict[int, Tensor] = {}
        self.model, self.stack = model, ExitStack()
        self.edited = 0

    def __enter__(self) -> Oracle:
        for block in find_anatomy(self.model).main.blocks:

            def see(_: Any, args: Any, kwargs: Any, index: int = block.index) -> None:
                self.states[index] = args[0] if args else kwargs["hidden_states"]

            module = self.model.get_submodule(block.path)
            self.stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def __call__(self, site: Site, weights: Tensor) -> Tensor:
        layers = range(2, LAYERS) if self.mitigation.recipe == "code" else range(LAYERS - 1)
        if site.layer not in (self.mitigation.layers or layers):
            return weights
        sink = sinks_of(self.states[site.layer], self.mitigation.recipe == "code") & self.real
        if self.prompt is not None:
            sink[:, self.prompt :] = False
        rows = self.real & ~self.visual
        new = dense_var(weights, sink, self.visual, rows, self.mitigation)
        changed = (new != weights).any(-1) & self.real[:, None]
        self.edited += int(changed.sum())
        return new


CASES = {
    "paper": VAR(dims=DIMS, tau=TAU, rho=0.5, floor=0.1),
    "code": VAR(dims=DIMS, tau=TAU, rho=0.6, floor=0.1, p=0.3, recipe="code"),
    "visual to all": VAR(dims=DIMS, tau=TAU, rho=0.3, floor=0.05, sinks="visual", budget="all"),
    "text to text": VAR(dims=DIMS, tau=TAU, rho=0.0, floor=0.0, sinks="text", budget="text", layers=[1, 3]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", VLMS)
def test_var_equals_its_formula(family: str, case: str) -> None:
    """A padded batch: heads are chosen row by row, images and padding are left alone."""
    model, mitigation = build(family), CASES[case]
    given = inputs(family, batch=2, length=17, padding="left")
    with Oracle(model, given, mitigation) as oracle, rewritten(model, oracle, oracle.real):
        expected = logits(model, given).double()
    plain = logits(model, given)
    with mitigation(model) as effect:
        found = logits(model, given)
    assert_close(found.double(), expected, oracle.real)
    assert 0 < effect.rows_edited == oracle.edited < effect.rows_seen
    assert not torch.allclose(found[oracle.real], plain[oracle.real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_trace_under_var_sees_the_edited_map(family: str) -> None:
    """Also on top of another mitigation."""
    model, mitigation = build(family), CASES["paper"]
    given = inputs(family, batch=2, length=17, padding="left")
    seen = []
    with Oracle(model, given, mitigation) as oracle:

        def check(site: Site, call: AttentionCall, found: Any) -> None:
            weights = oracle(site, full_map(AttentionCall(**{**vars(call), "edits": ()})))
            truth = statistics_of(call, weights, torch.zeros_like(weights[..., 0]))
            for stat in (Stat.RECEIVED, Stat.ENTROPY, Stat.ROW_MAX, Stat.GROUP_MASS):
                torch.testing.assert_close(found.values[stat].double(), truth.values[stat], rtol=0, atol=3e-5)
            seen.append(site.layer)

        with mitigation(model), watched(model, oracle.real, check):
            logits(model, given)
    assert seen == list(range(LAYERS))
    with ZeroTuning(gamma=3.0)(model), mitigation(model) as effect:
        logits(model, given)
    assert effect.acted


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_sinks_of_the_prompt_are_kept_while_it_generates(family: str) -> None:
    """Step by step as all at once with the sinks of the prompt."""
    model, mitigation = build(family), CASES["paper"]
    given = inputs(family, batch=2, length=13, padding="left")
    prompt = given["input_ids"].shape[1] - 4
    first = {name: value for name, value in given.items()}
    for name, value in given.items():
        if value.ndim == 2 and value.shape == given["input_ids"].shape:
            first[name] = value[:, :prompt]
    with mitigation(model) as effect, torch.no_grad():
        out = model(**first, use_cache=True)
        parts = [out.logits[:, -1]]
        for at in range(prompt, prompt + 4):
            out = model(
                input_ids=given["input_ids"][:, at : at + 1],
                attention_mask=given["attention_mask"][:, : at + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            parts.append(out.logits[:, -1])
    assert effect.acted
    found = torch.stack(parts[1:], 1).double()
    with Oracle(model, given, mitigation, prompt) as oracle, rewritten(model, oracle, oracle.real):
        expected = logits(model, {**given, "use_cache": False}).double()  # type: ignore[dict-item]
    limit = 3e-5 * float(expected.abs().max())
    torch.testing.assert_close(found, expected[:, prompt:], rtol=0, atol=limit)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_generate_and_updates(family: str) -> None:
    model, given = build(family), inputs(family, batch=2, length=13, padding="left")
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def generated(**more: Any) -> Tensor:
        return torch.stack(model.generate(**given, **options, **more).logits)

    plain = generated()
    with CASES["paper"](model):
        kept = generated()
    with VAR(dims=DIMS, tau=TAU, rho=0.5, floor=0.1, update_decode=True)(model):
        updated = generated()
    assert not torch.allclose(plain[0], kept[0], atol=1e-4)
    torch.testing.assert_close(kept[0], updated[0], rtol=0, atol=0)
    assert not torch.equal(kept[-1], updated[-1])


def test_pictures_one_by_one_are_all_at_once_where_there_is_one() -> None:
    model, given = build("llava"), inputs("llava", batch=2, length=13, padding="left")
    with CASES["paper"](model):
        together = logits(model, given)
    with VAR(dims=DIMS, tau=TAU, rho=0.5, floor=0.1, per_image=True)(model):
        apart = logits(model, given)
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-6)


def test_two_pictures_pass_one_by_one() -> None:
    """The second picture has too many sinks: its attention stays, and so do the shares of its other tokens."""
    mass = torch.tensor([[[[0.1, 0.1, 0.3, 0.2, 0.1]]]])
    shares = Shares(mass, torch.full((1, 1, 1), 0.2), torch.zeros(1, 1, 1))
    found = redistributed(shares, moved=0.5, least_rest=0.6, floor=0.2)
    assert bool(found.edited.all())
    expected = [0.5, 0.5, 1 + 0.5 * 0.2 / 0.3, 1.0, 1.0]
    torch.testing.assert_close(found.factors[0, 0, 0], torch.tensor(expected))


def test_nothing_to_edit_is_said_with_the_reason() -> None:
    model, given = build("llava"), inputs("llava")
    plain = logits(model, given)  # the first call leaves hooks of transformers' own
    before = state(model)
    with (
        pytest.warns(NothingEdited, match="because no token is a sink by its state"),
        VAR(dims=DIMS, tau=7.9)(model) as e,
    ):
        assert torch.equal(logits(model, given), plain)
    with pytest.raises(ModelError, match="no token is a sink"):
        e.require()
    text = {"input_ids": torch.randint(5, 300, (1, 9))}
    with pytest.warns(NothingEdited, match="because no prompt has visual tokens"), CASES["paper"](model):
        logits(model, text)
    with pytest.raises(ModelError, match="needs a model that reads pictures"), CASES["paper"](build("llama")):
        pass
    with pytest.raises(UsageError, match="none are published"), VAR()(model):
        pass
    with pytest.raises(UsageError, match="There is no dim 999"), VAR(dims=(999,))(model):
        pass
    with VAR(p=0.0, dims=DIMS)(model) as effect:
        assert effect.identity
    assert state(model) == before
    for bad in (
        {"p": 1.5},
        {"rho": -0.1},
        {"sinks": "some"},
        {"budget": "none"},
        {"recipe": "x"},
        {"dims": ()},
    ):
        with pytest.raises(UsageError):
            VAR(**bad)  # type: ignore[arg-type]
