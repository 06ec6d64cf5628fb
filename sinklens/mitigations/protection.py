"""What a quantiser should keep in higher precision, as data that other programs can read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sinklens.core.errors import DataError
from sinklens.models.spec import ModelInfo, OpenedModel

from .quantise import FakeQuantisation
from .quantise_parts import matrices

FORMAT, VERSION = "sinklens-protection", 1
Pair = tuple[int, int]


@dataclass(frozen=True)
class Protection:
    """Parts of a model that carry a sink.

    Attributes:
        layers: Blocks whose down projection writes the massive activations (0-based).
        dims: Massive dims of the residual stream.
        positions: Positions of sink tokens; their activations are to be kept.
        experts: Super Experts, `(layer, expert)`.
    """

    layers: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    experts: tuple[Pair, ...] = ()

    @property
    def empty(self) -> bool:
        return not (self.layers or self.dims or self.positions or self.experts)

    @classmethod
    def of(cls, method: FakeQuantisation) -> Protection:
        """What a quantisation keeps already."""
        return cls(
            tuple(method.protect_layers),
            tuple(method.protect_dims),
            tuple(method.protect_positions),
            tuple(method.protect_experts),
        )

    def applied(self, method: FakeQuantisation) -> FakeQuantisation:
        """The same quantisation with these parts kept."""
        return replace(
            method,
            protect="named",
            protect_layers=self.layers,
            protect_dims=self.dims,
            protect_positions=self.positions,
            protect_experts=self.experts,
        )

    def controls(
        self, opened: OpenedModel, *, tokens: int, draws: int = 5, seed: int = 0
    ) -> tuple[Protection, ...]:
        """As many other parts of each kind, drawn at random; experts from the same blocks.

        Kinds of which too few others are left get as many as there are.

        Args:
            tokens: Positions are drawn below this.
        """
        tower, rng = opened.anatomy.main, np.random.default_rng(seed)

        def others(count: int, taken: Sequence[int], wanted: int) -> tuple[int, ...]:
            free = np.setdiff1d(np.arange(count), np.array(taken, dtype=np.int64))
            return tuple(sorted(rng.permutation(free)[:wanted].tolist()))

        found = []
        for _ in range(draws):
            experts: list[Pair] = []
            for layer in sorted({layer for layer, _ in self.experts}):
                mine = [expert for at, expert in self.experts if at == layer]
                experts += [(layer, expert) for expert in others(tower.n_experts, mine, len(mine))]
            dense = [block.index for block in tower.blocks if block.down_proj or block.shared_down_proj]
            without = [block.index for block in tower.blocks if block.index not in dense]
            found.append(
                Protection(
                    others(len(tower.blocks), (*self.layers, *without), len(self.layers)),
                    others(tower.hidden_size, self.dims, len(self.dims)),
                    others(tokens, self.positions, len(self.positions)),
                    tuple(experts),
                )
            )
        return tuple(dict.fromkeys(found))

    def to_json(self, opened: OpenedModel) -> dict[str, Any]:
        """Everything by number and, for quantisers that go by names, by module.

        Returns:
            `layers`, `dims`, `positions`, `experts` as in the attributes. `modules`: a row per weight matrix of which
            something is to be kept: its `path` and `parameter`, whether the `whole` of it, which `inputs` and
            `outputs` (columns and rows of the matrix as `[out, in]`), and which `experts` of fused ones. `ignore`:
            names, or with `re:` patterns, of modules to leave out altogether, as they are when experts are modules of
            their own.
        """
        tower = opened.anatomy.main
        rows = []
        for layer in range(len(tower.blocks)):
            for matrix in matrices(opened.module, tower, layer):
                row = {
                    "layer": layer,
                    "path": matrix.path,
                    "parameter": matrix.name,
                    "whole": matrix.down and layer in self.layers,
                    "inputs": list(self.dims) if matrix.reads else [],
                    "outputs": list(self.dims) if matrix.writes else [],
                    "experts": [e for at, e in self.experts if at == layer] if matrix.fused else [],
                }
                if row["whole"] or row["inputs"] or row["outputs"] or row["experts"]:
                    rows.append(row)
        ignore = sorted({row["path"] for row in rows if row["whole"]})
        paths = {block.index: block.experts for block in tower.blocks}
        for layer, expert in self.experts:
            path = str(paths[layer]).replace(".", r"\.")
            ignore.append(rf"re:^{path}\.{expert}\..*")
        info: ModelInfo = opened.info
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": {
                "id": info.id,
                "revision": info.revision,
                "family": info.family,
                "layers": len(tower.blocks),
                "hidden_size": tower.hidden_size,
                "experts": tower.n_experts,
            },
            "layers": list(self.layers),
            "dims": list(self.dims),
            "positions": list(self.positions),
            "experts": [list(pair) for pair in self.experts],
            "modules": rows,
            "ignore": ignore,
        }

    def save(self, path: str | Path, opened: OpenedModel) -> Path:
        """Write `to_json` to a file."""
        path = Path(path)
        path.write_text(json.dumps(self.to_json(opened), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path, opened: OpenedModel | None = None) -> Protection:
        """Read a file of `save`.

        Args:
            opened: The model it is meant for; checked if given.

        Raises:
            DataError: Not such a file, or made for a model of another shape.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{path.name} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise DataError(f"{path.name} is not JSON.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise DataError(
                f"{path.name} does not say what to protect.",
                detail=f"Expected format {FORMAT!r}, version {VERSION}.",
            )
        if opened is not None:
            _same_shape(data["model"], opened, path)
        return cls(
            tuple(data["layers"]),
            tuple(data["dims"]),
            tuple(data["positions"]),
            tuple((layer, expert) for layer, expert in data["experts"]),
        )


def _same_shape(saved: dict[str, Any], opened: OpenedModel, path: Path) -> None:
    tower = opened.anatomy.main
    here = {
        "family": opened.info.family,
        "layers": len(tower.blocks),
        "hidden_size": tower.hidden_size,
        "experts": tower.n_experts,
    }
    wrong = [f"{key} {saved[key]} there, {value} here" for key, value in here.items() if saved[key] != value]
    if wrong:
        raise DataError(
            f"{path.name} was made for another model ({saved['id']}).", detail="; ".join(wrong) + "."
        )
