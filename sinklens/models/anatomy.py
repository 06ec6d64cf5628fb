"""Where things are in a model, found by role: towers, blocks, attention, feed-forward, experts, norms.

A block is an item of a ModuleList that holds one self-attention; the list is a tower. Nothing here knows a model
by name, so a family that appears tomorrow is read the same way, or refused with what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from sinklens.core.errors import ModelError

from .blocks import attention_output, read_block
from .parts import (
    attention_kind,
    expert_count,
    first_int,
    head_counts,
    is_leaf,
    is_norm,
    linear_shape,
    norm_width,
    refers_to,
    uses_softmax,
)
from .reading import events
from .spec import Anatomy, Block, Tower

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "num_selected_experts", "top_k_experts")
READS = "sinklens reads decoder-only models, encoders, vision encoders and vision-language models of transformers."


def find_anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of `model`, without running it; weights may be on any device, `meta` included.

    Raises:
        ModelError: Not a transformers model, an encoder-decoder, no softmax attention, blocks in stages, blocks
            that are used more than once, or two self-attentions per block. The message names the family and
            what was found.
    """
    family = _family(model)
    attentions = _attentions(model)
    stacks, problems = _stacks(model, attentions)
    if not stacks:
        raise _nothing_found(model, family)
    towers: list[Tower] = []
    failed: dict[str, tuple[str, ModelError]] = {}
    for stack in sorted(stacks, key=lambda name: -_size(model.get_submodule(name))):
        kind = _kind(model, stack, list(stacks), [tower.name for tower in towers])
        try:
            if stack in problems:
                raise ModelError(f"{family} {problems[stack]}. sinklens does not read that.", hint=READS)
            towers.append(_tower(model, kind, stack, stacks[stack], attentions, list(stacks)))
        except ModelError as error:
            failed[stack] = (kind, error)
    # A vision encoder alone is not what was asked for if the language model beside it cannot be read.
    needed = not any(tower.name == "text" for tower in towers)
    for kind, error in failed.values():
        if not towers or (kind == "text" and needed):
            raise error
    towers.sort(key=lambda tower: {"text": 0, "vision": 1}.get(tower.name, 2))
    skipped = tuple(f"{stack}: {error.what}" for stack, (_, error) in failed.items())
    return Anatomy(family, tuple(towers), all(tower.routed for tower in towers), skipped)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _family(model: nn.Module) -> str:
    """The `model_type`, after refusing what is not a model of one token stream."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if not family:
        raise ModelError(
            f"{type(model).__name__} is not a transformers model: it has no config with a model_type.",
            hint="Load it with transformers (AutoModelForCausalLM, AutoModel, ...) and pass that model.",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{family} is an encoder-decoder: its decoder attends to another sequence, not only to its own.",
            detail=f"Found {type(model).__name__} with is_encoder_decoder=True.",
            hint=READS,
        )
    return str(family)


def _attentions(model: nn.Module) -> dict[str, str]:
    """Paths of the self-attention modules, and their kind: innermost, but not helpers inside a routed one."""
    found = {
        name: kind
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (kind := attention_kind(module))
    }
    routed = [name for name, kind in found.items() if kind == "interface"]
    helpers = {
        name
        for name, kind in found.items()
        if kind == "softmax" and any(name.startswith(f"{other}.") for other in routed)
    }
    kept = {name: kind for name, kind in found.items() if name not in helpers}
    outer = {name for name in kept if any(other.startswith(f"{name}.") for other in kept)}
    return {name: kind for name, kind in kept.items() if name not in outer}


def _stacks(model: nn.Module, attentions: dict[str, str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """ModuleList path to `{block path: attention path}`, and why some of these lists cannot be read."""
    stacks: dict[str, dict[str, str]] = {}
    problems: dict[str, str] = {}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    owner: dict[int, str] = {}
    for attention in attentions:
        above = [path for path in reversed(_above(attention)) if path in lists]
        if not above:
            continue
        stack, inner = above[0], above[-1]
        block = f"{stack}.{attention.removeprefix(f'{stack}.').split('.')[0]}"
        other = stacks.setdefault(stack, {}).get(block)
        shared = owner.setdefault(id(model.get_submodule(attention)), attention)
        problem = None
        if inner != stack:
            problem = f"keeps its blocks in stages or groups: {inner!r} inside {stack!r}"
        elif block == attention:
            problem = f"keeps its attentions apart from the rest of their blocks, in {stack!r}"
        elif other is not None:
            problem = f"has two attentions per block: {other!r} and {attention!r} (perhaps to another input)"
        elif shared != attention:
            problem = f"uses one attention module in several blocks: {shared!r} and {attention!r}"
        if problem is not None:
            problems.setdefault(stack, problem)
        stacks[stack].setdefault(block, attention)
    return stacks, problems


def _nothing_found(model: nn.Module, family: str) -> ModelError:
    """What the model has instead of softmax attention, in its longest list of modules."""
    modules = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(modules, key=len, default=None)
    if longest is None or not len(longest):
        return ModelError(f"{family}: no blocks were found in {type(model).__name__}.", hint=READS)
    block = longest[0]
    parts = ", ".join(sorted({type(child).__name__ for child in block.children()})) or "nothing"
    unread = sorted({type(part).__name__ for part in block.modules() if uses_softmax(type(part))})
    unread = [name for name in unread if "attention" in name.lower()]
    if unread:
        return ModelError(
            f"{family} computes its attention in a form that sinklens cannot read.",
            detail=f"Its {len(longest)} blocks are {type(block).__name__}; a softmax is in {', '.join(unread)}.",
            hint=READS,
        )
    return ModelError(
        f"{family}: no softmax attention was found, so there are no attention sinks to measure.",
        detail=f"Its {len(longest)} blocks are {type(block).__name__} with {parts}.",
        hint=READS,
    )


def _kind(model: nn.Module, stack: str, stacks: list[str], taken: list[str]) -> str:
    """What enters the tower, judged by the nearest module around it that turns something into vectors.

    `vision` for patches (a convolution over three colours, or a patch size in the config), `text` for a token
    embedding, `audio` for another convolution; else, or when that name is taken, the tower's place in the model.
    """
    place = _scope(stack, stacks) or stack
    config = _config(model, stack)
    rows = first_int(config, ("vocab_size",)) or math.inf
    kind = "vision" if hasattr(config, "patch_size") else place
    for path in _above(stack) if kind == place else []:
        modules = [module for _, module in _apart(model, path, stack, stacks)]
        if any(isinstance(m, nn.Conv2d | nn.Conv3d) and m.in_channels == 3 for m in modules):
            kind = "vision"
        elif any(isinstance(m, nn.Embedding) and m.num_embeddings >= rows for m in modules):
            kind = "text"
        elif any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in modules):
            kind = "audio"
        if kind != place:
            break
    return kind if kind not in taken else place


def _apart(model: nn.Module, path: str, stack: str, stacks: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Modules below `path` that belong to no stack and not to the part of the model around another stack."""
    others = [stack, *(_scope(other, stacks) or other for other in stacks if other != stack)]
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if not any(name == other or name.startswith(f"{other}.") for other in others):
            yield name, module


def _scope(stack: str, stacks: list[str]) -> str:
    """The largest module around `stack` that holds no other stack."""
    scope = stack
    while scope:
        above = scope.rpartition(".")[0]
        if any(other != stack and (not above or other.startswith(f"{above}.")) for other in stacks):
            return scope
        scope = above
    return scope


def _config(model: nn.Module, path: str) -> Any:
    """The config of the nearest module above `path` that has one; a block's own comes first."""
    inner = [path, *(f"{path}.0.{name}" for name, _ in model.get_submodule(path)[0].named_modules() if name)]  # pyright: ignore
    for name in inner[1:]:
        if (config := getattr(model.get_submodule(name), "config", None)) is not None:
            return config
    while path:
        path = path.rpartition(".")[0]
        if (config := getattr(model.get_submodule(path), "config", None)) is not None:
            return config
    return None


def _tower(
    model: nn.Module,
    name: str,
    stack: str,
    paths: dict[str, str],
    attentions: dict[str, str],
    stacks: list[str],
) -> Tower:
    config = _config(model, stack)
    items = [f"{stack}.{key}" for key, _ in model.get_submodule(stack).named_children()]
    _count(model, stack, items, config)
    first = next(iter(paths))
    hidden = _hidden(model, first, paths[first])
    blocks: list[Block] = []
    for path in [first, *(item for item in items if item != first)]:
        attention = paths[path].removeprefix(f"{path}.") if path in paths else None
        like = blocks[0] if attention is None else None
        blocks.append(read_block(model.get_submodule(path), path, items.index(path), attention, hidden, like))
    blocks.sort(key=lambda block: block.index)
    _same_width(model, blocks, hidden)
    if (active := getattr(config, "altup_active_idx", None)) is not None:
        blocks = [replace(block, stream=active) for block in blocks]
    heads, kv_heads = head_counts(model.get_submodule(paths[first]), config)
    experts = max((expert_count(model.get_submodule(b.experts)) for b in blocks if b.experts), default=0)
    if not experts and not any(block.down_proj for block in blocks):
        experts = _experts_in(config)
    return Tower(
        name=name,
        blocks=tuple(blocks),
        hidden_size=hidden,
        heads=heads or 1,
        kv_heads=kv_heads or 1,
        causal=_causal(model, name, stack, model.get_submodule(paths[first]), config),
        embedding=_embedding(model, name, stack, stacks, config),
        final_norm=_final_norm(model, stack, _scope(stack, stacks), hidden),
        n_experts=experts,
        top_k=_top_k(model, blocks, config) if experts else 0,
        routed=all(attentions[attention] == "interface" for attention in paths.values()),
    )


def _count(model: nn.Module, stack: str, items: list[str], config: Any) -> None:
    expected = first_int(config, ("num_hidden_layers", "n_layer", "num_layers"))
    if expected is not None and expected != len(items):
        raise ModelError(
            f"{getattr(config, 'model_type', 'This model')}: found {len(items)} blocks in {stack!r}, "
            f"but its config says {expected} layers.",
            detail="Blocks that are shared by layers cannot be told apart."
            if len(items) < expected
            else f"{type(model).__name__} has blocks that its config does not know.",
            hint=READS,
        )


def _same_width(model: nn.Module, blocks: list[Block], hidden: int) -> None:
    for block in blocks:
        shape = linear_shape(model.get_submodule(block.attention_output)) if block.attention_output else None
        if shape is not None and shape[1] != hidden:
            raise ModelError(
                f"{_family(model)} changes its width between blocks, which sinklens does not read.",
                detail=f"Block 0 writes {hidden} values, {block.path!r} writes {shape[1]}.",
                hint=READS,
            )


def _hidden(model: nn.Module, block: str, attention: str) -> int:
    """Width of the residual stream: what W_O writes."""
    module = model.get_submodule(block)
    output = attention_output(module, attention.removeprefix(f"{block}."))
    shape = linear_shape(module.get_submodule(output)) if output else None
    widths = {norm_width(part) for part in module.modules() if is_norm(part)}
    if shape is None or (shape[1] not in widths and widths - {None}):
        raise ModelError(
            f"{_family(model)}: the output projection of {attention!r} was not found.",
            detail=f"Read the forward of {type(module).__name__}: no map to the width of its norms "
            f"({', '.join(str(width) for width in sorted(widths - {None}, key=str))}) follows its attention.",
            hint=READS,
        )
    return shape[1]


def _experts_in(config: Any) -> int:
    """Experts that the config promises although no fused expert weights were found."""
    count = first_int(config, EXPERTS)
    return count if count and count > 1 else 0


def _top_k(model: nn.Module, blocks: list[Block], config: Any) -> int:
    """Experts per token: of the router, of the mixture, of the config."""
    paths = [path for block in blocks for path in (block.router, block.mlp) if path and block.experts]
    values = (first_int(model.get_submodule(path), TOP_K) for path in paths)
    return next((value for value in values if value), None) or first_int(config, TOP_K) or 0


def _causal(model: nn.Module, name: str, stack: str, attention: nn.Module, config: Any) -> bool:
    """Causal if the attention says so, or if the modules around the tower build a causal mask (CLIP's text).

    Classes that build both kinds of mask (BERT) choose by `is_decoder`.
    """
    if name == "vision" or getattr(config, "use_bidirectional_attention", None) is True:
        return False
    declared = getattr(attention, "is_causal", None)
    if declared is True:
        return True
    around = [type(model.get_submodule(path)) for path in _above(stack)]
    causal = any(refers_to(cls, "causal_mask") for cls in around)
    both = any(refers_to(cls, "bidirectional_mask") for cls in around)
    if causal and not both:
        return True
    if declared is None and not both:
        return bool(getattr(model, "can_generate", lambda: False)())
    return bool(getattr(attention, "is_decoder", getattr(config, "is_decoder", False)))


def _above(path: str) -> list[str]:
    """Paths around `path`, nearest first, the root last."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _embedding(model: nn.Module, name: str, stack: str, stacks: list[str], config: Any) -> str | None:
    """The token embedding near the tower: as many rows as the vocabulary, else the fewest beyond it (padded)."""
    rows = first_int(config, ("vocab_size",))
    if name == "vision" or rows is None:
        return None
    for path in _above(stack):
        tables = {
            name: module.num_embeddings
            for name, module in _apart(model, path, stack, stacks)
            if isinstance(module, nn.Embedding) and module.num_embeddings >= rows
        }
        if tables:
            return min(tables, key=lambda name: tables[name])
    return None


def _final_norm(model: nn.Module, stack: str, scope: str, hidden: int) -> str | None:
    """The norm of the tower's width that a module around the blocks applies after them."""
    for path in _above(stack):
        if scope and path != scope and not path.startswith(f"{scope}."):
            break
        module = model.get_submodule(path)
        child = stack.removeprefix(f"{path}." if path else "").split(".")[0]
        seen = False
        for event in events(
            module, lambda item, inner=module._modules[child]: item is inner or is_leaf(item), path
        ):
            seen |= event.module is module._modules[child]
            direct = event.path.removeprefix(f"{path}." if path else "")
            norm = event.module if event.module is not None and is_norm(event.module) else None
            if seen and norm is not None and "." not in direct and norm_width(norm) in (hidden, None):
                return event.path
    return None
