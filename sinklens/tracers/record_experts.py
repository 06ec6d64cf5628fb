"""Signals of the experts seam: maxima per expert, how tokens were routed, and what the router gave all experts."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import signals as sig
from .attention import Site
from .experts import Lookup, Routed, router_scores
from .ledger import Arrays, Ledger
from .record_births import BIRTH_SIGNALS

ROUTER_SIGNALS = frozenset({sig.ROUTER_SCORE, sig.ROUTER_SCORE_OTHERS})
LATER = frozenset(
    {sig.WRITE_EXPERT, sig.WRITE_EXPERT_VALUE, sig.WRITE_NEURON, sig.WRITE_NEURON_VALUE, *BIRTH_SIGNALS}
)
"""Signals of the residual stream that look at the experts again when the block ends."""


class ExpertsRecorder:
    """Collects what one batch shows at the experts seam."""

    carried = ("routed_rows",)

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.routed_rows = 0
        self._raw: dict[int, Tensor] = {}
        self._prompt: Tensor | None = None

    @property
    def wanted(self) -> bool:
        """Whether any wanted signal needs the experts to be seen."""
        return any(signal.source is sig.Source.EXPERTS or signal in LATER for signal in self.ledger.wanted)

    @property
    def lookup(self) -> Lookup | None:
        """Which rows' neurons to find, for the tap."""
        return self._strongest if sig.EXPERT_NEURON in self.ledger.wanted else None

    def on_router(self, layer: int, raw: Tensor) -> None:
        """What the router of a block says, kept until its experts run."""
        self._raw[layer] = raw.detach()

    def on_experts(self, site: Site, routed: Routed) -> None:
        """Per-prompt maxima over the routed rows; padding is routed too and is dropped here."""
        wanted = self.ledger.wanted
        expert = routed.expert.view(self.ledger.batch.size, -1, routed.slots)
        self.routed_rows += int((expert < routed.n_experts).sum())
        if wanted & LATER:
            self.ledger.routed[site.layer] = routed
        raw = self._raw.pop(site.layer, None)
        scores = (
            router_scores(raw, routed.index, routed.weight.view(-1, routed.slots))
            if raw is not None
            else None
        )
        names = ("value", "dim", "weight", "neuron")
        fields = {name: getattr(routed, name).view(expert.shape) for name in names}
        for row, places in enumerate(self.ledger.places(expert.shape[1], expert.device)):
            mine = {name: field[row][places].cpu().numpy() for name, field in fields.items()}
            chosen = expert[row][places]
            maxima = _expert_maxima(chosen.cpu().numpy(), mine, routed.n_experts)
            maxima[sig.ROUTER_CHOICE.name] = chosen.cpu().numpy().astype(np.int32)
            maxima[sig.ROUTER_WEIGHT.name] = mine["weight"]
            by_token = None if scores is None else scores.view(len(expert), -1, scores.shape[-1])[row][places]
            maxima |= _router(chosen, by_token, self.ledger.references[row], routed.n_experts)
            for name, array in maxima.items():
                if sig.BY_NAME[name.removesuffix("_pos").removesuffix("_dim")] in wanted:
                    self.ledger.put(row, name, site.layer, array)

    def _strongest(
        self, tokens: Int[Tensor, " row"], n_tokens: int, value: Float[Tensor, " row"]
    ) -> Int[Tensor, " found"]:
        """Of one expert's rows, the one with the largest entry for each prompt; the earliest token if several tie."""
        batch, size = self.ledger.batch.size, value.abs()
        if batch == 1 and (self.ledger.real is None or len(self.ledger.real[0]) == n_tokens):
            return size.argmax(0, keepdim=True)
        prompt = self._prompts(n_tokens, tokens.device)[tokens]
        size = torch.where(prompt < batch, size, -1.0)
        largest = torch.full((batch + 1,), -1.0, device=size.device).scatter_reduce(0, prompt, size, "amax")
        order = torch.arange(len(tokens), device=tokens.device)
        first = torch.full((batch + 1,), len(tokens), dtype=torch.long, device=tokens.device)
        ties = torch.where((size == largest[prompt]) & (prompt < batch), order, len(tokens))
        found = first.scatter_reduce(0, prompt, ties, "amin")[:batch]
        return found[found < len(tokens)]

    def _prompts(self, n_tokens: int, device: torch.device) -> Int[Tensor, " token"]:
        """Prompt of each token of the padded batch, `batch.size` for padding."""
        if self._prompt is None or len(self._prompt) != n_tokens:
            batch = self.ledger.batch.size
            prompt = torch.full((batch, n_tokens // batch), batch, device=device)
            for row, places in enumerate(self.ledger.places(prompt.shape[1], device)):
                prompt[row, places] = row
            self._prompt = prompt.flatten()
        return self._prompt


def _router(
    chosen: Int[Tensor, "pos slot"],
    scores: Float[Tensor, "pos expert"] | None,
    references: list[int],
    n_experts: int,
) -> Arrays:
    """Scores at the reference positions and means over the others; NaN where there are none."""
    known = [(slot, pos) for slot, pos in enumerate(references) if 0 <= pos < len(chosen)]
    others = torch.ones(len(chosen), dtype=torch.bool, device=chosen.device)
    others[[pos for _, pos in known]] = False
    count = int(others.sum())
    nan = np.full(n_experts, np.nan, dtype=np.float32)
    picked = torch.bincount(chosen[others].flatten().clamp(0, n_experts), minlength=n_experts + 1)[:n_experts]
    out = {sig.ROUTER_FREQUENCY_OTHERS.name: (picked.float() / count).cpu().numpy() if count else nan}
    at = np.full((len(references), n_experts), np.nan, dtype=np.float32)
    mean = nan
    if scores is not None:
        for slot, pos in known:
            at[slot] = scores[pos].cpu().numpy()
        mean = scores[others].mean(0).cpu().numpy() if count else nan
    return {**out, sig.ROUTER_SCORE.name: at, sig.ROUTER_SCORE_OTHERS.name: mean}


def _expert_maxima(expert: np.ndarray, rows: Arrays, n_experts: int) -> Arrays:
    """Per expert: the largest entry with its place and neuron, the first routed row, and the number of tokens.

    Args:
        expert, rows: `[pos, slot]`, as in `Routed`.
    """
    value, dim, neuron = rows["value"], rows["dim"], rows["neuron"]
    pos, slot = np.indices(expert.shape).reshape(2, -1)
    flat, magnitude = expert.ravel(), np.abs(value).ravel()
    keep = flat < n_experts
    pos, slot, flat, magnitude = pos[keep], slot[keep], flat[keep], magnitude[keep]
    out = {
        "expert_max": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_max_pos": np.full(n_experts, -1, dtype=np.int32),
        "expert_max_dim": np.full(n_experts, -1, dtype=np.int32),
        "expert_neuron": np.full(n_experts, -1, dtype=np.int32),
        "expert_first_row": np.full(n_experts, np.nan, dtype=np.float32),
        "expert_tokens": np.bincount(flat, minlength=n_experts).astype(np.int32),
    }
    by_size = np.lexsort((pos, -magnitude, flat))
    seen, first = np.unique(flat[by_size], return_index=True)
    top = by_size[first]
    out["expert_max"][seen] = value[pos[top], slot[top]]
    out["expert_max_pos"][seen] = pos[top]
    out["expert_max_dim"][seen] = dim[pos[top], slot[top]]
    out["expert_neuron"][seen] = neuron[pos[top], slot[top]]
    # Per-expert loops order routed rows by slot, then token.
    by_slot = np.lexsort((pos, slot, flat))
    seen, first = np.unique(flat[by_slot], return_index=True)
    out["expert_first_row"][seen] = magnitude[by_slot[first]]
    return out
