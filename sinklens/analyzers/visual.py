"""What the analyzers of visual sinks read from a trace in the same way: pictures, sink dims, and which tokens sink."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float

from sinklens.core.errors import UsageError
from sinklens.inputs.spans import Kind, ModalitySpans, PatchGrid
from sinklens.tracers import signals as sig
from sinklens.tracers.signals_visual import KEY_CLASSES, LEAST_ENERGY
from sinklens.tracers.sink_dims import Cut, SinkDims, SinkRule
from sinklens.tracers.trace import PromptRecord, Trace

VISUAL, VISUAL_SINK, TEXT_SINK, DELIMITER, TEXT = range(len(KEY_CLASSES))
NO_PICTURES = (
    "no prompt has pictures. Give some with --images to a model that reads them; "
    "a model of text has no visual tokens."
)


@dataclass(frozen=True)
class Pictured:
    """A prompt with pictures.

    Attributes:
        phi: Of every token where a block begins; NaN where the trace does not hold it because it is small.
        sinks: Which tokens are sinks of the block.
    """

    record: PromptRecord
    spans: ModalitySpans
    phi: Float[np.ndarray, "layer pos"]
    sinks: Bool[np.ndarray, "layer pos"]

    @property
    def visual(self) -> Bool[np.ndarray, " pos"]:
        return self.spans.visual

    @property
    def text_queries(self) -> int:
        """How many queries of text there are after the first picture."""
        return int(self.spans.is_(Kind.QUESTION, Kind.GENERATED).sum())

    def visual_sinks(self) -> Bool[np.ndarray, "layer pos"]:
        return self.sinks & self.visual

    def sink_somewhere(self) -> Bool[np.ndarray, " pos"]:
        """Visual tokens that are a sink of some layer."""
        return np.asarray(self.visual_sinks().any(axis=0))

    def text_sinks(self) -> Bool[np.ndarray, "layer pos"]:
        return self.sinks & ~self.visual

    def grids(self, picture: int) -> tuple[PatchGrid, ...]:
        return self.spans.of_picture(picture)


def with_pictures(trace: Trace) -> list[PromptRecord]:
    return [record for record in trace if record.spans is not None and record.spans.visual.any()]


def rule_of(trace: Trace) -> SinkRule | None:
    """The sink dims and the threshold that the run decided by; None if none were looked for."""
    stored = trace.tracing.get("sinks")
    return None if stored is None else SinkRule.from_json(stored)


def no_rule(rule: SinkRule | None) -> str | None:
    """Why there are no sinks to speak of: a sentence; None if there are sink dims."""
    if rule is None:
        return "no sink dims were looked for; profile again."
    if not rule.dims:
        return f"the model has no sink dims: {rule.dims.failed or 'none were given.'}"
    return None


def chosen_rule(rule: SinkRule, dims: str, tau: float, tau_energy: float, *, strict: bool) -> SinkRule:
    """A run's rule with an analyzer's own dims, if it names any, and its threshold."""
    if dims:
        rule = replace(rule, dims=SinkDims.given(parse_dims(dims), rule.dims.hidden_size))
    return replace(rule, tau=tau, tau_energy=tau_energy or None, strict=strict)


def parse_dims(text: str) -> tuple[int, ...]:
    """`1415+2533`, also with commas or spaces.

    Raises:
        UsageError: Something else.
    """
    parts = text.replace("+", " ").replace(",", " ").split()
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise UsageError(f"Sink dims are numbers, as in 1415+2533; got {text!r}.") from None


def decided(record: PromptRecord, rule: SinkRule, recorded: SinkRule) -> Pictured:
    """φ and the sinks of a prompt by a rule, which need not be the one of the run.

    Raises:
        UsageError: A threshold so low that entries that reach it were not kept.
    """
    cut = rule.cut
    if rule.dims.indices == recorded.dims.indices and sig.PHI.name in record.arrays:
        phi = record[sig.PHI].astype(np.float64)
    else:
        if cut.energy < LEAST_ENERGY:
            raise UsageError(
                f"φ ≥ {cut.tau:g} is {100 * cut.energy:.2g} % of a state's energy, and traces keep entries from "
                f"{100 * LEAST_ENERGY:g} % on.",
                hint="Profile again with these sink dims, or choose a higher threshold.",
            )
        phi = _phi_from_list(record, rule.dims.indices)
    # float32 as when it was recorded, so that a threshold cuts where it cut then.
    sinks = cut.reached(np.nan_to_num(phi.astype(np.float32), nan=0.0))
    assert record.spans is not None
    return Pictured(record, record.spans, phi, sinks)


def _phi_from_list(record: PromptRecord, dims: tuple[int, ...]) -> Float[np.ndarray, "layer pos"]:
    """φ over any dims from the entries that were kept; NaN where none of them was."""
    name = sig.INPUT_LARGE.name
    value = np.abs(record[name]).astype(np.float64)
    layer, pos, dim = (record[f"{name}_{axis}"] for axis in ("layer", "pos", "dim"))
    kept = np.isin(dim, dims)
    layers = len(record[sig.INPUT_TYPICAL])
    phi = np.zeros((layers, len(record)))
    np.maximum.at(phi, (layer[kept], pos[kept]), value[kept])
    return np.where(phi > 0, phi, np.nan)


def chance_per_token(cut: Cut, dims: int) -> float:
    """Share of tokens that would be sinks if the entries of their states were normal numbers, at least about."""
    return min(1.0, dims * math.erfc(cut.tau / math.sqrt(2)))


def cells(spans: ModalitySpans) -> Iterator[tuple[int, PatchGrid, int, int, int]]:
    """Picture, grid, row, column and position of every visual token."""
    for grid in spans.grids:
        for row, col in np.argwhere(grid.positions >= 0).tolist():
            yield grid.picture, grid, row, col, int(grid.positions[row, col])


def n_pictures(records: list[PromptRecord]) -> int:
    return sum(len(record.spans.pictures) for record in records if record.spans is not None)


def sources_of(dims: SinkDims) -> str:
    """Where sink dims come from, in words: `found on 8 text prompts` or `published: title, address (paper)`."""
    listed = ", ".join(map(str, dims.indices))
    if dims.provenance == "discovered":
        return f"dim{'s' if len(dims.indices) > 1 else ''} {listed}, found on {dims.source}"
    if dims.provenance == "published":
        return f"dim{'s' if len(dims.indices) > 1 else ''} {listed}, published: {dims.source} ({dims.status})"
    return f"dim{'s' if len(dims.indices) > 1 else ''} {listed}, {dims.source}"
