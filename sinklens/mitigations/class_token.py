"""What the class token of a vision tower attends to: which visual tokens carry detail, and which a summary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.spec import AttentionCall, AttentionStatistics, Stat, Want
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import Tower
from sinklens.tracers.attention import AttentionTap, Site, sites
from sinklens.tracers.record_vision import vision_tower

from .tokens import Tokens

_NAMES = ("class_embedding", "cls_token")


def tower_with_class_token(title: str, model: nn.Module) -> Tower:
    """The vision tower of a model.

    Raises:
        ModelError: There is none, its attention cannot be reached, or it has no class token.
    """
    tower = vision_tower(find_anatomy(model))
    if tower is None or not tower.routed:
        raise ModelError(
            f"{title} needs a vision tower whose attention can be seen.",
            detail="It has none, or one that does not call attention through transformers' registry.",
        )
    inside = tower.blocks[0].path.split(".")[0:-3]
    prefix = ".".join(inside)
    if not any(name.startswith(prefix) and name.endswith(_NAMES) for name, _ in model.named_parameters()):
        raise ModelError(
            f"{title} needs a vision tower with a class token, and this one has none.",
            detail="It chooses visual tokens by the attention of that token.",
        )
    return tower


@dataclass
class ClassTokenWatch:
    """Attention of the class token in the first and in the last but one layer of the vision tower.

    Attributes:
        share: Part of the tokens of a picture that are local.
    """

    model: nn.Module
    tower: Tower
    tokens: Tokens
    share: float
    _views: dict[int, Float[Tensor, "view key"]] = field(default_factory=dict)
    _used: tuple[int, int] = (-1, -1)
    _passes: int = 0

    @contextmanager
    def attached(self) -> Iterator[ClassTokenWatch]:
        """Watch every pass of the vision tower."""
        layers = (0, max(0, len(self.tower.blocks) - 2))
        found = sites(self.model, self.tower, "attention")
        where = {module: site for module, site in found.items() if site.layer in layers}
        with AttentionTap(where, _first_row, self._see).attached(self.model):
            yield self

    def _see(self, site: Site, call: AttentionCall, found: AttentionStatistics) -> None:
        # All heads together, as the program has it.
        self._views[site.layer] = found[Stat.RECEIVED_ROWS].sum(1)
        if site.layer == 0:
            self._passes += 1

    def groups(
        self, visual: Bool[Tensor, "batch token"]
    ) -> tuple[Bool[Tensor, "batch token"], Bool[Tensor, "batch token"]]:
        """Local and summary tokens.

        Raises:
            ModelError: The pictures of the prompt were not read while the watch was on, or their tokens are not one per
                patch.
        """
        run = self.tokens.generation.run
        # generate() may show a picture to the tower once for all passes over its prompt; others have to show it anew.
        again = self._used[0] == self._passes and (run == 0 or self._used[1] != run)
        if not self._views or again:
            raise ModelError(
                "The vision tower did not read the pictures of this prompt inside of the `with` block.",
                detail="Its class token says which visual tokens count.",
                hint="Give the pictures to the model (pixel_values) inside of the block.",
            )
        self._used = (self._passes, run)
        (_, first), (_, late) = sorted(self._views.items())[0], sorted(self._views.items())[-1]
        local, summary = chosen(first[:, 1:], late[:, 1:], self.share)
        return self._placed(local, visual), self._placed(summary, visual)

    def _placed(self, member: Bool[Tensor, "view patch"], visual: Bool[Tensor, "batch token"]) -> Tensor:
        """From patches to the tokens that stand for them, picture after picture."""
        count, patches = int(visual.sum()), member.numel()
        beams = self.tokens.generation.beams
        if count == patches + len(member):  # the class token is handed on too
            member = torch.nn.functional.pad(member, (1, 0), value=False)
        flat = member.flatten()
        if beams > 1 and count == beams * len(flat):
            by_prompt = int(visual[0].sum())
            flat = flat.view(-1, by_prompt).repeat_interleave(beams, 0).flatten()
        if len(flat) != count:
            raise ModelError(
                "Which patch a visual token stands for cannot be told.",
                detail=f"The vision tower has {patches} patches, and the prompts have {count} visual tokens.",
                hint="It can be where every patch is one token, as in LLaVA-1.5.",
            )
        out = torch.zeros_like(visual)
        out[visual] = flat.to(visual.device)
        return out


def _first_row(site: Site, call: AttentionCall) -> Want:
    batch, _, queries, _ = call.query.shape
    probes = torch.zeros(batch, queries, dtype=torch.bool, device=call.query.device)
    probes[:, 0] = True
    return Want(frozenset({Stat.RECEIVED_ROWS}), probes=probes)


def chosen(
    first: Float[Tensor, "view patch"], late: Float[Tensor, "view patch"], share: float
) -> tuple[Bool[Tensor, "view patch"], Bool[Tensor, "view patch"]]:
    """Local patches, the `share` with most attention in the first layer, and summaries, outliers of the late one.

    An outlier is what a box plot shows as one, above. A patch that is both is a summary.
    """
    wide = late.double()
    low, high = torch.quantile(wide, torch.tensor([0.25, 0.75], dtype=wide.dtype, device=wide.device), dim=1)
    summary = wide > (high + 1.5 * (high - low))[:, None]
    order = first.argsort(dim=1, descending=True, stable=True)[:, : int(first.shape[1] * share)]
    local = torch.zeros_like(summary).scatter(1, order, True)
    return local & ~summary, summary
