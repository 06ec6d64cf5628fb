"""Statistics of attention estimated from a sample of each prompt's query rows: what is asked, and what it gives up.

An estimate is never silent: its standard error is stored beside it (`<signal>_se`), the rows that were looked at are
stored too (`sampled_rows`), and signals whose definition needs every row are not recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sinklens.core.errors import UsageError
from sinklens.inputs.spec import PromptSet
from sinklens.kernels.sample import LEADING, LEAST_ROWS, TAIL, RowSample, draw_rows
from sinklens.kernels.sampled import ESTIMABLE
from sinklens.models.spec import OpenedModel

from . import signals as sig
from .attention import Mode
from .batch import Batch
from .record_attention import STATS_OF
from .record_reading import PROBE_SHARE
from .signals import SAMPLED_ROWS as SAMPLED_ROWS
from .signals import Signal

if TYPE_CHECKING:
    from .executor import TracePlan


ESTIMATED = frozenset(
    {
        sig.ATTENTION_RECEIVED,
        sig.ATTENTION_RECEIVED_MEAN,
        sig.ATTENTION_RECEIVED_PEAK,
        sig.ATTENTION_TOP1,
        sig.ATTENTION_ENTROPY,
        sig.ATTENTION_ENTROPY_NORMALISED,
        sig.ATTENTION_DISTANCE,
        sig.ATTENTION_ROW_MAX,
        sig.LEARNED_SINK_MASS,
    }
)
"""Signals that a sample gives an estimate of."""

_REASONS = {
    sig.ATTENTION_SELF: "a position's attention to itself is in its own row alone",
    sig.COLUMN_ENTROPY: "the entropy of a column is no mean over rows, so an estimate from some of them is biased",
    sig.COLUMN_ENTROPY_PEAK: "the entropy of a column is no mean over rows, so an estimate from some is biased",
    sig.LOCAL_DISTANCE: "it has a value for every row",
    sig.FUTURE_INFLUENCE: "it reads rows at set distances from every key",
    sig.PROBE_RECEIVED: f"it is defined on rows of its own (the last {100 * PROBE_SHARE:.0f} % and as many others)",
    sig.PROBE_VISIBLE: "it is defined on rows of its own",
    sig.FIRST_MASS: "it counts every row",
    sig.REFERENCE_MASS: "it counts every row after a position",
}


@dataclass(frozen=True)
class Sampling:
    """How many query rows of each prompt are looked at.

    Attributes:
        rows: Their number if at least 1, else their share of the prompt.
        seed: With the prompt's index it decides which ones.
    """

    rows: float
    seed: int = 0

    @classmethod
    def parse(cls, asked: str | float, seed: int = 0) -> Sampling:
        """From `512`, `0.1` or `10%`.

        Raises:
            UsageError: Anything else.
        """
        text = str(asked).strip()
        try:
            rows = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            rows = math.nan
        whole = rows >= 1 and rows == int(rows) and not text.endswith("%")
        if not (whole or 0 < rows < 1):
            raise UsageError(
                f"--sample-queries is a number of query rows (512) or a share of them (0.1 or 10%), got {text!r}.",
                hint="Leave it out to look at every row.",
            )
        if whole and rows < LEAST_ROWS:
            raise UsageError(
                f"--sample-queries {text} is too small; it takes at least {LEAST_ROWS} rows.",
                detail=f"The first {LEADING} and the last {TAIL} rows of a prompt are always taken.",
            )
        return cls(rows, seed)

    def count(self, length: int) -> int:
        """Rows to take of a prompt of this length."""
        wanted = int(self.rows) if self.rows >= 1 else math.ceil(self.rows * length)
        return min(length, max(wanted, LEAST_ROWS))

    def of_prompt(self, index: int, length: int) -> RowSample | None:
        """The rows of a prompt; None for all."""
        return draw_rows(length, self.count(length), (self.seed, index))

    def of_batch(self, batch: Batch) -> tuple[RowSample | None, ...] | None:
        """The rows of each prompt of a batch, as places in its padded rows; None if it is of no prompts."""
        if not batch.prompts or batch.valid is None:
            return None
        found = []
        for prompt, valid in zip(batch.prompts, batch.valid, strict=True):
            places = np.flatnonzero(valid.cpu().numpy())
            sample = self.of_prompt(prompt.index, len(places))
            found.append(None if sample is None else sample.at(places))
        return tuple(found)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        asked: dict[str, Any] = {"rows": int(self.rows)} if self.rows >= 1 else {"share": self.rows}
        return {
            **asked,
            "seed": self.seed,
            "always": {"first": LEADING, "last": TAIL},
            "method": "simple random sampling without replacement within strata of position",
            "standard_errors": "<signal>_se; of a mean over heads a bound",
            "estimated": sorted(signal.name for signal in ESTIMATED),
            "not_estimated": {signal.name: why for signal, why in not_estimable().items()},
        }


def refuse_sampling(plan: TracePlan, opened: OpenedModel, prompts: PromptSet) -> None:
    """Refuse to sample where the rows are not seen one by one, or are few anyway.

    Raises:
        UsageError: Saying why.
    """
    if plan.sampling is None:
        return
    reason = None
    if plan.mode is Mode.FUSED:
        reason = "in fused mode the pass that gives the output goes over every query row anyway"
    elif opened.backend != "hf":
        reason = f"the {opened.backend} backend shows whole attention maps"
    elif not opened.anatomy.routed:
        reason = "this model's attention is read from its own weights, which are computed for every row"
    elif any(prompt.visual is not None for prompt in prompts.prompts):
        reason = "what is read of pictures (text queries, classes of keys) is defined on every row"
    if reason is not None:
        raise UsageError(
            f"--sample-queries does not apply: {reason}.", hint="Leave it out to look at every row."
        )


def not_estimable() -> dict[Signal, str]:
    """Signals that need every row, and why."""
    by_stats = [signal for signal, stats in STATS_OF.items() if stats - ESTIMABLE]
    return {signal: _REASONS.get(signal, "it needs every row") for signal in by_stats}
