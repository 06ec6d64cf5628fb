"""From findings back into TransformerLens: `sl.tl`.

run = sl.profile(bridge)
logits, cache = bridge.run_with_cache(tokens, names_filter=sl.tl.names(run))
for place in sl.tl.places(run):
    print(place, place.of(cache).mean())
with sl.tl.hooks(sl.mitigations.ZeroTuning(gamma=2.0), bridge) as applied:
    logits = bridge.run_with_hooks(tokens, fwd_hooks=applied.fwd_hooks)
rows = sl.tl.patch_sink(run, bridge, tokens)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinklens.core.errors import DataError, ModelError
from sinklens.models.spec import OpenedModel
from sinklens.tracers.backends import backend_of, open_with
from sinklens.tracers.backends.bridge_attention import Seam
from sinklens.tracers.backends.bridge_edits import Hook, edit_hooks

from .run import Run

PATTERN, STATE, MLP = "blocks.{}.attn.hook_pattern", "blocks.{}.hook_out", "blocks.{}.mlp.hook_out"


@dataclass(frozen=True)
class Place:
    """Where a finding is in the activations of a bridge.

    Attributes:
        finding: The analyzer that found it.
        hook: Name of the hook point.
        index: Of its value: all prompts, then head and key, or position and dim.
        about: In words.
    """

    finding: str
    hook: str
    index: tuple[Any, ...]
    about: str

    def of(self, cache: Any) -> Tensor:
        """What a cache (an `ActivationCache`, or any mapping by hook name) holds there, for every prompt."""
        return cache[self.hook][self.index]

    def __str__(self) -> str:
        return f"{self.hook}: {self.about}"


def places(run: Run) -> list[Place]:
    """The sink heads, massive entries and writers of a run as places in a bridge's activations.

    Positions are those of prompts that begin as the run's did (BOS, template) and are not padded on the left.
    """
    whole = slice(None)
    found: list[Place] = []
    sinks = run.findings.get("primary-sinks")
    if sinks is not None and sinks.rows:
        position = sinks.rows[0]["position"]
        for layer, head, _ in sinks.summary.get("heads", []):
            index = (whole, head, whole, position)
            about = f"attention of head {head} to the sink on position {position}"
            found.append(Place("primary-sinks", PATTERN.format(layer), index, about))
    massive = run.findings.get("massive-activations")
    for row in massive.rows if massive is not None else ():
        index = (whole, row["position"], row["dim"])
        about = f"massive activation in dim {row['dim']} on position {row['position']}"
        found.append(Place("massive-activations", STATE.format(row["layer"]), index, about))
    writers = run.findings.get("writers")
    for row in writers.rows if writers is not None else ():
        if row["sublayer"] == "mlp":
            index = (whole, row["position"], row["dim"])
            about = f"{row['role']} dim {row['dim']} on position {row['position']}"
            found.append(Place("writers", MLP.format(row["layer"]), index, about))
    return found


def names(run: Run) -> list[str]:
    """Names of the hook points of those places, for `names_filter`."""
    return list(dict.fromkeys(place.hook for place in places(run)))


@dataclass(frozen=True)
class Applied:
    """A mitigation that acts while `fwd_hooks` are on the bridge, and what it did."""

    fwd_hooks: list[Hook]
    effect: Any


@contextmanager
def hooks(what: Any, bridge: Any) -> Iterator[Applied]:
    """Hook functions that apply a mitigation, or a recipe, inside `bridge.run_with_hooks`.

    Args:
        what: A mitigation, or the recipe that a calibration gave (refused if it belongs to another model).
        bridge: A TransformerBridge, or what `open_with` made of it.

    Raises:
        ModelError: The bridge shows no place where the mitigation could act.
    """
    opened = _bridge(bridge)
    if hasattr(what, "check") and hasattr(what, "mitigation"):
        what.check(opened.plain)
        what = what.mitigation
    fwd_hooks = edit_hooks(opened)
    with what(opened) as effect:
        yield Applied(fwd_hooks, effect)


def patch_sink(
    run: Run,
    bridge: Any,
    tokens: Tensor,
    *,
    layers: Sequence[int] | None = None,
    control: int | None = None,
) -> list[dict[str, Any]]:
    """Patch the sink's state after one block at a time, and see what becomes of the sink and of the predictions.

    How it is computed: the state of the sink's position after the block is replaced by the mean state of the other
    positions of the same prompt; `sink_share` is the mean attention that later blocks give the position (queries
    after it, all heads). `control_*` patches another position the same way, so what is left of a difference is due to
    the sink's state and not to patching.

    Args:
        run: Whose strongest primary sink is patched.
        tokens: Ids `[prompt, pos]` without padding.
        layers: Blocks; None patches each but the last.
        control: Position of the control; None takes the middle of the prompt.

    Returns:
        One row per block: `layer`, `position`, `share_before`, `sink_share`, `control_share` (shares), `loss_before`,
        `loss_change` and `control_loss_change` (nats per token).

    Raises:
        DataError: The run has no primary sink, or the prompts are too short.
        ModelError: No hook of the bridge shows its attention.
    """
    opened = _bridge(bridge)
    held = opened.handle
    if held.seam is Seam.REGISTRY:
        raise ModelError("This bridge leaves attention to transformers, so no hook shows the sink's share.")
    position = _sink_of(run)
    control = _control_in(tokens.shape[1], position, control)
    count = len(opened.anatomy.main.blocks)
    chosen = range(count - 1) if layers is None else layers
    return [_patched_beside(held.bridge, tokens, layer, count, position, control) for layer in chosen]


def _sink_of(run: Run) -> int:
    """The position of the strongest primary sink."""
    rows = run.findings["primary-sinks"].rows if "primary-sinks" in run.findings else []
    if not rows:
        raise DataError(
            "This run has no primary sink to patch.", hint="See run.primary_sinks for the reason."
        )
    return int(rows[0]["position"])


def _control_in(length: int, position: int, asked: int | None) -> int:
    """The position of the control, by default the middle of the prompt."""
    control = length // 2 if asked is None else asked
    if length < position + 3 or control == position or not 0 <= control < length:
        raise DataError(
            f"Prompts of {length} tokens are too short for the sink on {position} and its control."
        )
    return control


def _patched_beside(
    bridge: Any, tokens: Tensor, layer: int, count: int, position: int, control: int
) -> dict[str, Any]:
    """A row: the model as it is, with the sink's state patched, and with the control's."""
    plain, patched, other = (
        _patched(bridge, tokens, layer, count, position, at) for at in (None, position, control)
    )
    return {
        "layer": layer,
        "position": position,
        "share_before": plain[0],
        "sink_share": patched[0],
        "control_share": other[0],
        "loss_before": plain[1],
        "loss_change": patched[1] - plain[1],
        "control_loss_change": other[1] - plain[1],
    }


def _patched(
    bridge: Any, tokens: Tensor, layer: int, count: int, position: int, at: int | None
) -> tuple[float, float]:
    """Attention to `position` in blocks after `layer`, and the loss, with the state at `at` replaced."""
    shares: list[float] = []

    def share(pattern: Tensor, hook: Any) -> None:
        shares.append(float(pattern[:, :, position + 1 :, position].float().mean()))

    fwd_hooks: list[Hook] = [(PATTERN.format(later), share) for later in range(layer + 1, count)]
    if at is not None:
        fwd_hooks.append((STATE.format(layer), mean_state(at)))
    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, return_type="logits")
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    return sum(shares) / len(shares), float(loss)


def mean_state(position: int) -> Callable[..., Tensor]:
    """A hook function that gives one position the mean state of the others."""

    def hook(state: Tensor, hook: Any) -> Tensor:
        others = torch.arange(state.shape[1], device=state.device) != position
        state = state.clone()
        state[:, position] = state[:, others].mean(1)
        return state

    return hook


def _bridge(bridge: Any) -> OpenedModel:
    opened = bridge if isinstance(bridge, OpenedModel) else open_with(bridge)
    if backend_of(opened).name != "transformer-lens":
        raise ModelError(
            f"Expected a TransformerBridge, found a model of {backend_of(opened).title}.",
            hint="transformer_lens.model_bridge.TransformerBridge.boot_transformers(name) gives one.",
        )
    return opened
