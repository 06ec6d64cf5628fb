"""Values that others published, beside the model at hand, with the differences of protocol in words."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinklens.core.counts import counted
from sinklens.core.errors import UsageError
from sinklens.core.suggest import did_you_mean
from sinklens.models.catalog import aliases

if TYPE_CHECKING:
    from .run import Run

STATUS = {
    "measured": "measured by us",
    "code": "read in the authors' code or result files",
    "paper": "read in the paper",
    "third party": "third party: read in notes, re-measurements or copies",
    "memory": "unverified: remembered, not read again",
}
UNVERIFIED = "memory"
FAMILY_QUANTITIES = ("sink_rate", "massive_dims", "super_experts")
"""What is shown of relatives where nothing is published about the model itself."""
SAME, FAMILY = "this model", "family"


@dataclass(frozen=True)
class Published:
    """One published value.

    Attributes:
        quantity, title, unit: What it is.
        value: A number, a list, or words where the value has several parts.
        protocol: How it was measured, as far as it is known: `epsilon, seq_len, bos, dtype, n_prompts, data`.
        status: A key of `STATUS`.
    """

    model: str
    family: str
    ids: tuple[str, ...]
    quantity: str
    title: str
    unit: str
    value: Any
    remark: str
    source: str
    url: str
    where: str
    status: str
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The value with its unit."""
        several = isinstance(self.value, list)
        value = ", ".join(map(str, self.value)) or "none" if several else str(self.value)
        return f"{value} %" if self.unit == "%" else value

    @property
    def protocol_words(self) -> str:
        """The protocol as far as it is known."""
        return ", ".join(
            _PROTOCOL[key].format(value) for key, value in self.protocol.items() if key != "bos"
        ) + ("" if "bos" not in self.protocol else ", with BOS" if self.protocol["bos"] else ", without BOS")


_PROTOCOL = {
    "epsilon": "epsilon {:g}",
    "seq_len": "{} tokens",
    "dtype": "{}",
    "n_prompts": "{} prompts",
    "data": "{}",
}


@cache
def published(*, unverified: bool = False) -> tuple[Published, ...]:
    """All published values; those nobody read again only if asked for."""
    data = tomllib.loads((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))
    return tuple(
        _value(data, group, entry)
        for group in data["group"]
        if unverified or group["status"] != UNVERIFIED
        for entry in group["values"]
    )


def _value(data: dict[str, Any], group: dict[str, Any], entry: list[Any]) -> Published:
    key, value, *rest = entry
    remark = rest[0] if rest else ""
    own = rest[1] if len(rest) > 1 else {}
    model, quantity = data["models"][key], data["quantities"][group["quantity"]]
    source = data["sources"][group["source"]]
    url = f"https://arxiv.org/abs/{source['arxiv']}" if "arxiv" in source else source.get("code", "")
    return Published(
        model["name"],
        model["family"],
        tuple(model["ids"]),
        group["quantity"],
        quantity["title"],
        quantity["unit"],
        value,
        remark,
        source["title"],
        url,
        group["where"],
        group["status"],
        {**group["protocol"], **own},
    )


def of_model(model: str, *, unverified: bool = False) -> list[Published]:
    """What is published about a model by any of its names, also one that nothing here opens.

    Raises:
        UsageError: Nothing is.
    """
    known = published(unverified=unverified)
    wanted = aliases()[model.lower()].target if model.lower() in aliases() else model
    found = [
        v for v in known if v.model.lower() == model.lower() or any(_is_called(wanted, n) for n in v.ids)
    ]
    if not found:
        names = sorted({value.model for value in known})
        raise UsageError(
            f"No published value of {model!r} is known here.",
            detail=did_you_mean(model, names) or f"There are values of: {', '.join(names)}.",
        )
    return found


def about(model_id: str, family: str) -> tuple[str | None, list[Published]]:
    """What is published about a model, else about its relatives.

    Args:
        model_id: As in results: `org/name`, `bundled:name` or a folder, whose last part is taken for the name.
        family: The config's `model_type`.

    Returns:
        `this model`, `family` or None, and the values.
    """
    same = [value for value in published() if any(_is_called(model_id, name) for name in value.ids)]
    if same:
        return SAME, same
    related = [v for v in published() if v.family == family and v.quantity in FAMILY_QUANTITIES]
    related = [value for value in related if not any(name.startswith("bundled:") for name in value.ids)]
    return (FAMILY, related) if related else (None, [])


def _is_called(model_id: str, name: str) -> bool:
    given, known = model_id.lower().rstrip("/"), name.lower()
    if given == known:
        return True
    is_folder = not given.startswith("bundled:") and (given.count("/") != 1 or given.startswith((".", "/")))
    return is_folder and given.rpartition("/")[2] == known.rpartition("/")[2]


def references(run: Run) -> dict[str, Any]:
    """The `references` section of a run's document.

    Returns:
        `match` (`this model`, `family` or None), and `rows`: per value `model, quantity, title, unit, published, here,
        remark, status, status_words, source, url, where, protocol, differences`; `here` is None where the run has no
        such value or the value is a relative's.
    """
    match, values = about(run.trace.info.id, run.trace.info.family)
    rows = [_row(value, run, match == SAME) for value in values]
    return {"match": match, "rows": rows}


def _row(value: Published, run: Run, same: bool) -> dict[str, Any]:
    return {
        "model": value.model,
        "quantity": value.quantity,
        "title": value.title,
        "unit": value.unit,
        "published": value.value,
        "here": measured_here(value.quantity, run) if same else None,
        "remark": value.remark,
        "status": value.status,
        "status_words": STATUS[value.status],
        "source": value.source,
        "url": value.url,
        "where": value.where,
        "protocol": dict(value.protocol),
        "differences": differences(value.protocol, run),
    }


def measured_here(quantity: str, run: Run) -> Any:
    """The run's own value of a published quantity, None if it has none."""
    finding = {
        "sink_rate": "primary-sinks",
        "massive_dims": "massive-activations",
        "massive_max": "massive-activations",
        "massive_blocks": "massive-activations",
        "super_experts": "super-experts",
        "strong_sink_heads": "head-classes",
    }.get(quantity, "")
    found = run.findings.get(finding)
    if found is None or found.reason is not None:
        return None
    summary = found.summary
    if quantity == "super_experts":
        return [
            f"L{row['layer']}E{row['expert']}" if row["expert"] >= 0 else f"L{row['layer']} {row['kind']}"
            for row in found.rows
        ]
    if quantity == "massive_blocks":
        first, last = summary.get("first_layer"), summary.get("last_layer")
        return "none" if first is None else f"{first} to {last}"
    key = {
        "sink_rate": "first_position_rate",
        "massive_dims": "dims",
        "massive_max": "largest_abs",
        "strong_sink_heads": "n_strong_sink",
    }[quantity]
    return summary.get(key)


def differences(protocol: Mapping[str, Any], run: Run) -> list[str]:
    """How the published protocol differs from the run's, in words; what is not known is not guessed."""
    manifest = run.trace.manifest
    inputs, sinks = manifest.get("inputs", {}), run.findings.get("primary-sinks")
    said = []
    length = inputs.get("longest")
    if _apart(protocol, "seq_len", length):
        said.append(f"prompts of {protocol['seq_len']} tokens there, of up to {length} here")
    epsilon = sinks.parameters.get("epsilon") if sinks else None
    if _apart(protocol, "epsilon", epsilon):
        said.append(f"epsilon {protocol['epsilon']:g} there, {epsilon:g} here")
    bos = inputs.get("bos_added")
    if _apart(protocol, "bos", bos):
        said.append("with BOS there, without here" if protocol["bos"] else "without BOS there, with BOS here")
    if _apart(protocol, "dtype", run.trace.info.dtype):
        said.append(f"{protocol['dtype']} there, {run.trace.info.dtype} here")
    if _apart(protocol, "n_prompts", inputs.get("n_prompts")):
        said.append(f"{counted(protocol['n_prompts'], 'prompt')} there, {inputs.get('n_prompts')} here")
    if "data" in protocol and protocol["data"] != inputs.get("source"):
        said.append(f"other texts: {protocol['data']} there, {inputs.get('source')} here")
    if not protocol:
        said.append("how it was measured is not known to us")
    return said


def _apart(protocol: Mapping[str, Any], key: str, here: Any) -> bool:
    return key in protocol and here is not None and protocol[key] != here
