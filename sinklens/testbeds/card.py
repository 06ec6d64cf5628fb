"""The card of a trained checkpoint: its recipe and what it shows, measured on held-out sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .data import QueryClass
from .measure import Reading, read, without_expert
from .train import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .recipe import Recipe

EPSILON = 0.3


def facts(model: PreTrainedModel, recipe: Recipe, sequences: int = 64) -> dict[str, Any]:
    """What the model shows on `sequences` held-out sequences, as plain numbers; layers and heads are 0-based.

    Returns:
        `loss` and `floor` (nats), `sink_rate` and `heads_above` (shares at epsilon 0.3),
        `received[layer][head]` (attention to BOS, mean), `by_class[class][layer][head]`, per layer
        `norm_ratio`, `largest` (abs, position, dim, ratio to median) and `value_ratio`; with experts,
        `experts` (strongest first) and the pruning test.
    """
    ids = held_out(recipe, sequences)
    reading = read(model, ids)
    classes = torch.from_numpy(recipe.task.classify(ids.numpy()))
    received = reading.received().mean(1)
    to_bos = reading.attention[..., 0].movedim(2, 1)
    found: dict[str, Any] = {
        "loss": reading.loss,
        "floor": recipe.task.floor(ids.numpy()),
        "sink_rate": reading.sink_rate(epsilon=EPSILON),
        "heads_above": float((received > EPSILON).float().mean()),
        "received": received.tolist(),
        "by_class": {
            item.name: to_bos[:, :, classes == item].mean(-1).tolist() for item in QueryClass if item.value
        },
        "norm_ratio": reading.norm_ratio().tolist(),
        "largest": reading.largest(),
        "value_ratio": reading.value_ratio().tolist(),
    }
    if reading.experts is not None:
        found["experts"] = _experts(model, ids, reading)
    return found


def _experts(
    model: PreTrainedModel, ids: torch.Tensor, reading: Reading, top: int = 4
) -> list[dict[str, Any]]:
    """The strongest experts and what their removal does to the sink."""
    assert reading.experts is not None
    assert reading.expert_positions is not None
    width = reading.experts.shape[1]
    rows = []
    for flat in reading.experts.flatten().topk(top).indices.tolist():
        layer, expert = divmod(flat, width)
        with without_expert(model, layer, expert):
            pruned = read(model, ids)
        rows.append(
            {
                "layer": layer,
                "expert": expert,
                "abs_max": float(reading.experts[layer, expert]),
                "position": int(reading.expert_positions[layer, expert]),
                "loss_without": pruned.loss,
                "largest_share_without": float(pruned.received().mean(1).max()),
                "mean_share_without": float(pruned.received().mean()),
                "norm_ratio_without": float(pruned.norm_ratio().max()),
            }
        )
    return rows


def write_card(recipe: Recipe, found: dict[str, Any], model: PreTrainedModel) -> str:
    """The card as Markdown. States measurements only; what did not emerge is said."""
    parameters = sum(weight.numel() for weight in model.parameters())
    settings = ", ".join(f"{key} {value}" for key, value in recipe.model.items())
    lines = [
        f"# {recipe.name}",
        "",
        recipe.about,
        "",
        "A toy: it speaks only the 64 words of its synthetic language (`sinklens/testbeds/data.py`). Its "
        "weights are trained, not edited. The recipe was chosen among several because sinks emerge in it "
        "(see `docs/testbeds.md`), so it says nothing about how often models grow sinks.",
        "",
        f"- Architecture: {recipe.architecture}, {settings}; {parameters:,} parameters, stored in bfloat16.",
        f"- Training: {recipe.steps} steps of {recipe.batch} sequences of {recipe.length} tokens, AdamW lr "
        f"{recipe.learning_rate:g}, betas {recipe.betas}, weight decay {recipe.weight_decay:g} on all "
        f"parameters, {recipe.warmup} warm-up steps, gradient clip {recipe.clip:g}, seed {recipe.seed}, one "
        "CPU thread.",
        f"- Again: `sinklens testbed train {recipe.name}`.",
        "- `<unk>` and `<pad>` never occur in training.",
        "",
        "## Measured (stored weights, 64 held-out sequences, BOS first)",
        "",
        f"- Loss {found['loss']:.3f} nats; a reader who knows the language has {found['floor']:.3f}.",
        f"- Sink rate at epsilon {EPSILON}: {100 * found['sink_rate']:.1f} % of (sequence, layer, head); "
        f"heads whose mean exceeds {EPSILON}: {100 * found['heads_above']:.1f} %. Uniform attention would "
        f"give a share of {_uniform(recipe.length):.3f}.",
        "",
        "| block | head | attention to BOS | "
        + " | ".join(name.lower() for name in found["by_class"])
        + " |",
        "|---" * (3 + len(found["by_class"])) + "|",
    ]
    for layer, heads in enumerate(found["received"]):
        for head, share in enumerate(heads):
            cells = " | ".join(f"{rows[layer][head]:.2f}" for rows in found["by_class"].values())
            lines.append(f"| {layer} | {head} | {share:.2f} | {cells} |")
    lines += [
        "",
        "Columns after the mean split the queries by what the context allows (`QueryClass`).",
        "",
        "| block output | norm of BOS / median | largest activation | its position | its dim "
        "| over the median | value norm of BOS / median, by kv head |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer, (size, position, dim, ratio) in enumerate(found["largest"]):
        values = ", ".join(f"{value:.2f}" for value in found["value_ratio"][layer])
        norm = found["norm_ratio"][layer]
        lines.append(f"| {layer} | {norm:.1f} | {size:.1f} | {position} | {dim} | {ratio:.0f} | {values} |")
    lines += [
        "",
        "Maxima and medians are pooled over all sequences here; `sinklens profile` reports the ratio of the "
        "strongest single prompt, which is larger.",
    ]
    lines += _expert_lines(found)
    lines += ["", "## Did not emerge", "", *_absent(found), ""]
    return "\n".join(lines)


def _uniform(length: int) -> float:
    return sum(1 / (query + 1) for query in range(length)) / length


def _expert_lines(found: dict[str, Any]) -> list[str]:
    if "experts" not in found:
        return []
    lines = [
        "",
        "| block | expert | largest down_proj output | its position | without it: loss "
        "| largest mean share of a head on BOS | mean share | largest norm ratio of BOS |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["experts"]:
        lines.append(
            f"| {row['layer']} | {row['expert']} | {row['abs_max']:.1f} | {row['position']} | "
            f"{row['loss_without']:.3f} | {row['largest_share_without']:.2f} "
            f"| {row['mean_share_without']:.3f} | {row['norm_ratio_without']:.1f} |"
        )
    base = max(max(heads) for heads in found["received"])
    mean = sum(map(sum, found["received"])) / sum(map(len, found["received"]))
    lines += [
        "",
        f"With every expert: loss {found['loss']:.3f}, largest share {base:.2f}, mean share {mean:.3f}, "
        f"largest norm ratio {max(found['norm_ratio']):.1f}.",
    ]
    return lines


def _absent(found: dict[str, Any]) -> list[str]:
    """What a reader might expect and will not find, from the numbers alone."""
    sun = [row for row in found["largest"] if row[0] > 100 and row[3] > 1000]
    lines = []
    if not sun:
        best = max(row[3] for row in found["largest"])
        lines.append(
            "- Massive activations by the rule of Sun et al. (over 100 and over 1000 times the median): "
            f"the largest ratio is {best:.0f}. Use a relative threshold here, or a planted model."
        )
    quiet = [layer for layer, heads in enumerate(found["received"]) if max(heads) <= EPSILON]
    if quiet:
        lines.append(f"- A sink head (mean share over {EPSILON}) in blocks {', '.join(map(str, quiet))}.")
    lines.append("- A sink on a first token other than BOS was not trained for: keep BOS first.")
    return lines
