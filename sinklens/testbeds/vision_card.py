"""The card of a vision-language checkpoint: its recipe and what it shows, measured on held-out pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .vision import COLOURS, NUMBERS, SHAPES, VisionRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EPSILON = 0.3
PREFERENCE = 1.2
"""Background's share over its area share from which a head is said to prefer it."""
PEAK = 3.0
"""The most attended background patch over the picture's mean patch from which a head is said to single one out."""
OUTGROWN = 2.0
"""Median norm of background over that of objects from which background is said to outgrow them."""
COMMON = 0.9
"""Share of the background patches that must agree on their largest dim for it to be one common dim."""
VAR_TAU = 20.0
"""Threshold on phi in Kang et al., See What You Are Told (arXiv 2503.03321)."""


def write_vision_card(recipe: VisionRecipe, found: dict[str, Any], model: PreTrainedModel) -> str:
    """The card as Markdown, from `measure`'s numbers. What did not emerge is said."""
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            recipe.about,
            "",
            *_recipe_lines(recipe, sum(weight.numel() for weight in model.parameters())),
            "",
            f"## Measured (stored weights, {found['pictures']} held-out pictures with their true captions)",
            "",
            *_right_lines(recipe, found),
            "",
            *_stage_lines(found),
            "",
            *_head_lines(found),
            "",
            *_removal_lines(found),
            "",
            "## Did not emerge",
            "",
            *_absent(recipe, found),
            "",
        ]
    )


def _recipe_lines(recipe: VisionRecipe, parameters: int) -> list[str]:
    task = recipe.task
    vision, text = recipe.vision, recipe.text
    return [
        f"A toy: it knows pictures of {task.grid} x {task.grid} cells with 1 to {task.most} objects "
        f"({len(COLOURS)} colours, each at most once, {len(SHAPES)} shapes) on black, and their captions "
        "(`sinklens/testbeds/vision.py`). Its weights are trained, not edited. The pictures were redesigned until it "
        "learned to read them (see `docs/testbeds.md`), so it says nothing about how often models behave like this.",
        "",
        f"- Architecture: LLaVA; CLIP vision tower with {vision['num_hidden_layers']} blocks and a Llama with "
        f"{text['num_hidden_layers']}, each d {text['hidden_size']}, {text['num_attention_heads']} heads, feed-forward "
        f"{text['intermediate_size']}; a projector of two layers reads the last states of the vision tower; "
        f"{parameters:,} parameters, stored in bfloat16.",
        f"- Training: {recipe.steps} steps of {recipe.batch} new pictures, AdamW lr {recipe.learning_rate:g}, betas "
        f"{recipe.betas}, weight decay {recipe.weight_decay:g} on all parameters, {recipe.warmup} warm-up steps, "
        f"linear cool-down over the last {recipe.cooldown}, gradient clip {recipe.clip:g}, seed {recipe.seed}, one "
        "CPU thread; loss on the answers only.",
        f"- Again: `sinklens testbed train {recipe.name}`.",
        f"- Pictures: {task.side} x {task.side} pixels, RGB, divided by 255 and not centred; a cell of {task.cell} x "
        f"{task.cell} pixels is one patch and one image token. The processor beside this card does that "
        "(`AutoProcessor`, with Pillow); `samples/` has held-out pictures with their captions.",
        "- Prompt: `<image> how many ?`; answer, for instance: `two red bar cyan post`.",
        "- `sinklens_pictures.jsonl` names the held-out pictures in `pictures/`, each with its caption and the mask of "
        "its objects: what `sinklens profile` looks at if nothing else is asked for.",
        "- `sinklens_prompts.jsonl` holds captions without a picture, which the model was not trained on: a "
        "profile from texts says how the language tower behaves on such input, not how it reads pictures.",
        "- `<unk>` never occurs in training.",
    ]


def _right_lines(recipe: VisionRecipe, found: dict[str, Any]) -> list[str]:
    chances = {"count": len(NUMBERS[: recipe.task.most]), "colour": len(COLOURS), "shape": len(SHAPES)}
    lines = ["| answer | right | by chance |", "|---|---|---|"]
    for kind, options in chances.items():
        lines.append(f"| {kind} | {_percent(found['right'][kind])} | {_percent(1 / options)} |")
    lines.append(f"| whole caption, end included | {_percent(found['right']['caption'])} | - |")
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _stage_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "Residual stream after each block; norms are medians, phi is max |h| over the root mean square, the dim is "
        "the one that is largest in most background patches, |h| there a median, the ratio the largest |h| of all "
        "tokens over the median |h|.",
        "",
        "| after | norm: background | object | BOS | text | phi: background | object | BOS | text "
        "| dim | largest in | on background | on objects | ratio |",
        "|---" * 14 + "|",
    ]
    groups = ("background", "object", "bos", "text")
    for name, row in found["stages"].items():
        norms = [f"{row['norm'][group]:.1f}" if group in row["norm"] else "-" for group in groups]
        phis = [f"{row['phi'][group]:.1f}" if group in row["phi"] else "-" for group in groups]
        dim = [str(row["dim"]), _percent(row["dim_share"])]
        sizes = [f"{row['dim_value']:.1f}", f"{row['dim_objects']:.1f}", f"{row['ratio']:.0f}"]
        lines.append("| " + " | ".join([name, *norms, *phis, *dim, *sizes]) + " |")
    return lines


def _head_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "Attention of the text tokens, means over pictures. Background covers "
        f"{_percent(found['area'])} of the patches. Peak: the most attended background patch of a picture over the "
        "picture's mean patch.",
        "",
        "| block | head | to BOS | to the picture | of that, background | peak |",
        "|---|---|---|---|---|---|",
    ]
    for layer, heads in enumerate(found["heads"]):
        for head, row in enumerate(heads):
            lines.append(
                f"| {layer} | {head} | {row['bos']:.2f} | {row['image']:.2f} | {_percent(row['background'])} "
                f"| {row['peak']:.1f} |"
            )
    return lines


def _removal_lines(found: dict[str, Any]) -> list[str]:
    stated = (
        "Right answers (count, colour, shape) when K image tokens are hidden from the language tower; in "
    )
    first, *others = found["removal"]
    lines = [
        f"{stated}brackets the mean paired difference to `{first}` on the same pictures, with its standard error, in "
        "points.",
        "",
        "| hidden K | " + " | ".join(found["removal"]) + " |",
        "|---" * (2 + len(others)) + "|",
    ]
    for place, row in enumerate(found["removal"][first]):
        cells = [_percent(row["right"])]
        for name in others:
            other = found["removal"][name][place]
            difference, error = 100 * other["difference"], 100 * other["error"]
            cells.append(f"{_percent(other['right'])} ({difference:+.1f} ± {error:.1f})")
        lines.append(f"| {row['removed']} | " + " | ".join(cells) + " |")
    return lines


def _absent(recipe: VisionRecipe, found: dict[str, Any]) -> list[str]:
    """What a reader might expect and will not find, from the numbers alone."""
    heads = [row for rows in found["heads"] for row in rows]
    share, peak = max(row["background"] for row in heads), max(row["peak"] for row in heads)
    lines = []
    if share < PREFERENCE * found["area"] and peak < PEAK:
        lines.append(
            "- Visual attention sinks: no head gives background more than "
            f"{_percent(share)} of what it gives the picture (area {_percent(found['area'])}), and no background "
            f"patch gets more than {peak:.1f} times what the mean patch gets."
        )
    states = list(found["stages"].values())
    growth = max(row["norm"]["background"] / row["norm"]["object"] for row in states)
    if growth < OUTGROWN:
        lines.append(
            "- Large states on blank background: after no block is its median norm more than "
            f"{growth:.1f} times that of the objects."
        )
    common = max(row["dim_share"] for row in states)
    if common < COMMON:
        lines.append(
            "- One massive dim common to the background: no dim is the largest in more than "
            f"{_percent(common)} of its patches."
        )
    bos = max(row["bos"] for row in heads)
    if bos < EPSILON:
        lines.append(f"- A sink on BOS: the largest mean share of a head is {bos:.2f}.")
    ratio = max(row["ratio"] for row in states)
    if ratio < 1000:
        lines.append(
            "- Massive activations by the rule of Sun et al. (over 100 and over 1000 times the median): the largest "
            f"ratio is {ratio:.0f}."
        )
    cap = recipe.text["hidden_size"] ** 0.5
    if cap < VAR_TAU:
        lines.append(
            f"- Sink tokens by the rule of Kang et al. (phi of {VAR_TAU:g} or more): phi cannot exceed the root of "
            f"the width, here {cap:g}; the rule needs a scaled threshold."
        )
    return lines
