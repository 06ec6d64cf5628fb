"""Checks a request against a model before anything is edited: every refusal is here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sinklens.core.errors import UsageError

from ..blocks import Layer, decoder_layers, trunk
from .truth import (
    MassivePlant,
    PlantedHead,
    PlantedMassive,
    SecondaryPlant,
    SinkPlant,
    SuperExpertPlant,
    Target,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Plan:
    """A checked request: targets resolved, nothing overlapping, every index inside the model."""

    heads: tuple[PlantedHead, ...]
    massive: tuple[PlantedMassive, ...]

    @property
    def targets(self) -> tuple[Target, ...]:
        """In order of first mention."""
        return tuple(dict.fromkeys(item.target for item in (*self.massive, *self.heads)))


def make_plan(
    model: PreTrainedModel,
    sinks: Iterable[SinkPlant],
    massive: Iterable[MassivePlant],
    super_experts: Iterable[SuperExpertPlant],
    secondary: Iterable[SecondaryPlant],
) -> Plan:
    """Checks a request against the model.

    Raises:
        UsageError: A layer, head, dim, expert, token or position that does not exist; two plants in one
            place; a plant the model's structure cannot carry. The sentence names it.
        ModelError: An unsupported family.
    """
    layers = decoder_layers(model)
    checker = _Checker(model, layers)
    primary = [checker.massive(plant) for plant in massive]
    primary += [checker.super_expert(plant) for plant in super_experts]
    later = list(secondary)
    written = primary + [checker.secondary(plant, primary) for plant in later]
    checker.no_overlap(written)
    heads = [
        (plant.heads, checker.target(plant), plant.strength, False)
        for plant in sinks
        if checker.has_heads(plant)
    ]
    heads += [(plant.heads, checker.target(plant), plant.strength, True) for plant in later]
    planted: list[PlantedHead] = []
    for pairs, target, strength, own in heads:
        planted += [checker.head(pair, target, strength, written, own) for pair in pairs]
    checker.no_shared_heads(planted)
    if not planted and not written:
        raise UsageError("Nothing to plant: sinks, massive, super_experts and secondary are all empty.")
    return Plan(tuple(planted), tuple(written))


class _Checker:
    """The rules of a request, one method per kind of plant."""

    def __init__(self, model: PreTrainedModel, layers: list[Layer]) -> None:
        self.layers, self.config = layers, model.config
        self.positions = getattr(trunk(model), "wpe", None)

    def within(self, what: str, value: int, count: int, where: str = "") -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise UsageError(
                f"There is no {what} {value}{where}.", detail=f"There are {count} of them: 0 to {count - 1}."
            )

    def target(self, plant: Any) -> Target:
        token, position = plant.token, plant.position
        if token is not None and position is not None:
            raise UsageError(
                f"A plant has a token ({token}) and a position ({position}); give one of the two."
            )
        if position is not None:
            if self.positions is None:
                raise UsageError(
                    f"Position {position} cannot be a sink by itself in a {self.config.model_type} model.",
                    detail="Its positions are rotary, so attention sees distances, never a place.",
                    hint="Plant by token, for instance the BOS token, which stands at position 0.",
                )
            self.within("position", position, self.positions.num_embeddings)
            return Target(position=position)
        if token is None:
            if self.positions is not None:
                return Target(position=0)
            token = self.config.bos_token_id
            if token is None:
                raise UsageError("The model's config has no BOS token.", hint="Say which token: token=...")
        self.within("token", token, self.config.vocab_size)
        return Target(token=token)

    def massive(self, plant: MassivePlant) -> PlantedMassive:
        self.within("layer", plant.layer_in, len(self.layers))
        if self.layers[plant.layer_in].experts is not None:
            raise UsageError(
                f"Block {plant.layer_in} is an MoE block: which expert shall write dim {plant.dim}?",
                hint=f"Use SuperExpertPlant(layer={plant.layer_in}, expert=..., dim={plant.dim}).",
            )
        return self.written(
            self.target(plant), plant.dim, plant.layer_in, plant.layer_out, plant.magnitude, None
        )

    def super_expert(self, plant: SuperExpertPlant) -> PlantedMassive:
        self.within("layer", plant.layer, len(self.layers))
        self.expert(plant.layer, plant.expert)
        return self.written(
            self.target(plant), plant.dim, plant.layer, plant.layer_out, plant.magnitude, plant.expert
        )

    def expert(self, layer: int, expert: int | None) -> None:
        experts = self.layers[layer].experts
        if experts is None:
            if expert is not None:
                raise UsageError(
                    f"Block {layer} has no experts, so none can be a Super Expert.",
                    hint="Use MassivePlant for a dense block.",
                )
        elif expert is None:
            raise UsageError(f"Block {layer} is an MoE block: say which expert writes, expert=...")
        else:
            self.within("expert", expert, experts.num_experts, f" in block {layer}")

    def written(
        self,
        target: Target,
        dim: int,
        layer: int,
        layer_out: int | None,
        magnitude: float,
        expert: int | None,
    ) -> PlantedMassive:
        count = len(self.layers)
        self.within("dim", dim, self.config.hidden_size)
        if not math.isfinite(magnitude) or magnitude == 0:
            raise UsageError(f"A massive activation of {magnitude} is none; give a magnitude such as 500.")
        if layer_out is not None:
            self.within("layer", layer_out, count)
            if layer_out <= layer:
                raise UsageError(
                    f"Block {layer_out} cannot erase what block {layer} writes: it is not after it."
                )
        eraser = None
        experts = None if layer_out is None else self.layers[layer_out].experts
        if experts is not None:
            eraser = (0 if expert is None else expert + 1) % experts.num_experts
        return PlantedMassive(
            dim=dim,
            target=target,
            layer_in=layer,
            layer_out=count if layer_out is None else layer_out,
            magnitude=float(magnitude),
            expert=expert,
            eraser=eraser,
            erased=layer_out is not None,
        )

    def secondary(self, plant: SecondaryPlant, primary: list[PlantedMassive]) -> PlantedMassive:
        self.within("layer", plant.layer, len(self.layers))
        self.expert(plant.layer, plant.expert)
        target = self.target(plant)
        alive = [item for item in primary if item.lives_at(plant.layer) and item.target != target]
        if not alive:
            raise UsageError(
                f"No primary sink lives at block {plant.layer}, so {target} cannot become like it there.",
                detail="A secondary sink copies a massive dim that another target carries into that block.",
                hint="Add a MassivePlant or SuperExpertPlant with an earlier layer.",
            )
        if plant.lifetime is not None and plant.lifetime < 1:
            raise UsageError(f"A lifetime of {plant.lifetime} blocks is none; give 1 or more, or None.")
        out = None if plant.lifetime is None else plant.layer + plant.lifetime
        if (out is not None and out > alive[0].layer_out) or (out is None and alive[0].erased):
            raise UsageError(
                f"The secondary sink {target} would outlive its primary, ended by block {alive[0].layer_out}.",
                hint=f"Give a lifetime of at most {alive[0].layer_out - plant.layer}.",
            )
        out = None if out == len(self.layers) else out
        item = self.written(target, alive[0].dim, plant.layer, out, plant.magnitude or 1.0, plant.expert)
        return replace(
            item, secondary=True, magnitude=math.nan if plant.magnitude is None else item.magnitude
        )

    def has_heads(self, plant: SinkPlant) -> bool:
        if not plant.heads:
            raise UsageError(
                f"The sink on {self.target(plant)} names no heads.", hint="heads=[(layer, head), ...]"
            )
        return True

    def head(
        self,
        pair: tuple[int, int],
        target: Target,
        strength: float,
        written: list[PlantedMassive],
        own: bool,
    ) -> PlantedHead:
        index, head = pair
        self.within("layer", index, len(self.layers))
        layer = self.layers[index]
        self.within("query head", head, layer.heads, f" in block {index}")
        if not strength > 0 or not math.isfinite(strength):
            raise UsageError(f"A sink of strength {strength} is none; give nats above 0, such as 40.")
        if layer.softcap is not None and strength >= layer.softcap:
            raise UsageError(
                f"Block {index} caps its logits at {layer.softcap:g}: a strength of {strength:g} is out of reach."
            )
        carried = [item for item in written if item.target == target and item.lives_at(index)]
        via_massive = bool(carried) and not own
        dims = {item.dim for item in carried[:1]} if via_massive else set()
        rivals = tuple(
            i.target for i in written if i.dim in dims and i.target != target and i.lives_at(index)
        )
        return PlantedHead(
            layer=index,
            head=head,
            target=target,
            strength=float(strength),
            via="massive" if via_massive else "flag",
            shared_with=rivals,
            window=layer.window,
        )

    def no_overlap(self, written: list[PlantedMassive]) -> None:
        self._one_expert_each(written)
        for i, one in enumerate(written):
            for other in written[i + 1 :]:
                same = one.dim == other.dim and one.target == other.target
                if same and one.layer_in <= other.layer_out and other.layer_in <= one.layer_out:
                    raise UsageError(
                        f"Two plants overlap: dim {one.dim} of {one.target} is written by "
                        f"block {one.layer_in} and by block {other.layer_in}."
                    )
                if one.dim == other.dim and not same and not (one.secondary or other.secondary):
                    raise UsageError(
                        f"Two plants overlap: dim {one.dim} is for {one.target} and for {other.target}.",
                        hint="Give each its own dim, or make the second a SecondaryPlant.",
                    )

    def _one_expert_each(self, written: list[PlantedMassive]) -> None:
        """The router can send a target to one planted expert per block."""
        chosen: dict[tuple[int, Target], int] = {}
        for item in written:
            for layer, expert in ((item.layer_in, item.expert), (item.layer_out, item.eraser)):
                if expert is not None and chosen.setdefault((layer, item.target), expert) != expert:
                    raise UsageError(
                        f"Two plants overlap: block {layer} would send {item.target} to expert "
                        f"{chosen[layer, item.target]} and to expert {expert}.",
                        hint="Plant one expert per block and target.",
                    )

    def no_shared_heads(self, heads: list[PlantedHead]) -> None:
        seen: set[tuple[int, int]] = set()
        for head in heads:
            if (head.layer, head.head) in seen:
                raise UsageError(
                    f"Two plants overlap: head {head.head} of block {head.layer} is named twice."
                )
            seen.add((head.layer, head.head))
        for head in heads:
            layer = self.layers[head.layer]
            for other in heads:
                mates = other.layer == head.layer and layer.kv_of(other.head) == layer.kv_of(head.head)
                if mates and (other.target, other.via) != (head.target, head.via):
                    raise UsageError(
                        f"Heads {head.head} and {other.head} of block {head.layer} read the same key head, "
                        f"so they cannot sink on {head.target} and {other.target}.",
                        hint="Choose heads of different key-value groups.",
                    )
