"""From a source to a config, a model class, and a module with its weights."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sinklens.core.errors import ModelError, SinklensError, UsageError
from sinklens.core.suggest import did_you_mean

from .anatomy import READS
from .catalog import Source
from .checkpoint import check_tokenizer, check_weights, read_config
from .failures import explain
from .quantised import packed_format
from .spec import Anatomy
from .spread import Spread, bad_anywhere, own_part, spreading

DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "half": torch.float16, "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "fp64": torch.float64, "float64": torch.float64, "double": torch.float64,
}  # fmt: skip

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of accelerate to spread a model over devices."""


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | str:
    """A torch dtype, or `auto` for the checkpoint's own."""
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    if dtype.lower() not in DTYPES:
        raise UsageError(
            f"Unknown dtype {dtype!r}.",
            detail=did_you_mean(dtype, DTYPES),
            hint="Use auto, bf16, fp16, fp32 or fp64.",
        )
    return DTYPES[dtype.lower()]


def _checked_map(device_map: Any) -> Any:
    """A map as transformers takes it: a strategy, a device, or a dict of modules."""
    if isinstance(device_map, str) and device_map not in STRATEGIES:
        try:
            torch.device(device_map)
        except RuntimeError as error:
            raise UsageError(
                f"Unknown device map {device_map!r}.", hint=f"Use {', '.join(STRATEGIES)}, or a device."
            ) from error
    return device_map


def placement(device: str | torch.device | None, device_map: Any) -> Any:
    """The `device_map` for `from_pretrained`: the user's, one device, or None for the CPU."""
    if device_map is not None and device is not None:
        raise UsageError(
            "Give a device or a device map, not both.", hint="--device-map auto spreads over all devices."
        )
    if device_map is not None:
        return _checked_map(device_map)
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"Unknown device {device!r}.", hint="Use cpu, cuda, cuda:1 or mps.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"Device {device!r} was asked for, but this machine has no CUDA device.", hint="Use --device cpu"
        )
    _refuse_absent(chosen)
    return None if chosen.type == "cpu" else {"": chosen}


def _refuse_absent(device: torch.device) -> None:
    """Refuse a device that holds no numbers here."""
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise UsageError(
            f"Device '{device}' cannot be used on this machine: {str(error).splitlines()[0][:120]}",
            hint="Use --device cpu, or leave it out.",
        ) from error


def quantisation(name: Any) -> Any:
    """A quantisation config of transformers for `4bit` or `8bit`; a config object is passed through."""
    if name is None or not isinstance(name, str):
        return name
    if name not in ("4bit", "8bit"):
        raise UsageError(
            f"Unknown quantization {name!r}.", hint="Use 4bit or 8bit, or open a quantised checkpoint."
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=name == "4bit", load_in_8bit=name == "8bit")


def load_config(source: Source, trust_remote_code: bool) -> Any:
    """The config of a model that transformers (or, if trusted, the repository's own code) knows.

    Raises:
        ModelError: Not there, damaged, of an unknown architecture, or in need of its own code.
    """
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if source.folder is not None:
            raw = read_config(source.folder, source.id)
        else:
            raw, _ = PreTrainedConfig.get_config_dict(source.location, revision=source.revision)
        if not raw:
            raise ModelError(
                f"{source.id!r} has no config.json.", hint="Use a repository of transformers models."
            )
        _known(source, raw, CONFIG_MAPPING, trust_remote_code)
        return AutoConfig.from_pretrained(
            source.location, revision=source.revision, trust_remote_code=trust_remote_code
        )
    except SinklensError:
        raise
    except Exception as error:
        raise explain(error, source, "config") from error


def _known(source: Source, raw: dict[str, Any], families: Any, trusted: bool) -> None:
    family = raw.get("model_type")
    if family in families or (trusted and raw.get("auto_map")):
        return
    if raw.get("auto_map"):
        raise ModelError(
            f"{source.id!r} needs its own Python code to be run ({family or 'unnamed architecture'}).",
            detail="transformers does not contain this architecture; the repository brings it.",
            hint="If you trust it: --trust-remote-code (Python: trust_remote_code=True).",
        )
    if not family:
        raise ModelError(
            f"The config.json of {source.id!r} has no model_type, so its architecture is unknown.",
            hint="Save the model with save_pretrained of transformers, and open that folder.",
        )
    from transformers import __version__

    raise ModelError(
        f"{source.id!r} is a {family!r}, which transformers {__version__} does not know.",
        detail=did_you_mean(str(family), list(families)),
        hint="A newer transformers may know it: pip install -U transformers",
    )


def model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class to load: the architecture that the config names, else what its family is usually used as."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if trust_remote_code and getattr(config, "auto_map", None):
        names = [name for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")]
        return getattr(transformers, next((name for name in names if name in config.auto_map), "AutoModel"))
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_MASKED_LM_MAPPING
    images, kind = auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, type(config)
    if kind in images and hasattr(config, "vision_config"):
        return images[kind]
    mapping = causal if kind in causal and kind not in masked else auto.MODEL_MAPPING
    if kind not in mapping:
        raise ModelError(
            f"{config.model_type!r} is not a model of one stream of tokens or patches.",
            detail=f"Its config names {getattr(config, 'architectures', None) or 'no architecture'}.",
            hint=READS,
        )
    found = mapping[kind]
    return found[0] if isinstance(found, tuple | list) else found


def without_weights(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """The model on the `meta` device: its structure, without memory for weights."""
    cls, config = model_class(config, trust_remote_code), copy.deepcopy(config)
    with torch.device("meta"):
        if hasattr(cls, "from_config"):  # an Auto class, for remote code
            return cls.from_config(config, trust_remote_code=trust_remote_code)
        return cls(config)


def load_weights(
    source: Source,
    config: Any,
    *,
    dtype: Any,
    device_map: Any,
    trust_remote_code: bool,
    quantization: Any,
    spread: int | None = None,
) -> tuple[nn.Module, set[str]]:
    """The model with its weights, and the names of parameters that the checkpoint does not have."""
    if source.folder is not None:
        check_weights(source.folder, source.id)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if source.revision is not None:
        options["revision"] = source.revision
    if device_map is not None:
        options["device_map"] = device_map
    if quantization is not None:
        options["quantization_config"] = quantization
    if trust_remote_code:
        options["trust_remote_code"] = True
    if spread is not None:
        options["distributed_config"] = spreading(spread)
    try:
        with _bars_on_terminals_only():
            model, report = model_class(config, trust_remote_code).from_pretrained(source.location, **options)
    except SinklensError:
        raise
    except Exception as error:
        raise explain(error, source, "weights", packed_format(config)) from error
    return model.eval(), set(report["missing_keys"])


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The bar that transformers draws over shards, in a log or a notebook, would be lines of noise."""
    from transformers.utils.logging import set_tqdm_hook

    def made(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        shown = before or (lambda factory, args, options: factory(*args, **options))
        return shown(factory, args, options if sys.stderr.isatty() else {**options, "disable": True})

    before = set_tqdm_hook(made)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def check_complete(source: Source, anatomy: Anatomy, missing: set[str]) -> None:
    """Refuses a checkpoint that lacks parameters of a tower: transformers would have drawn them at random."""
    parts = [block.path for tower in anatomy.towers for block in tower.blocks]
    parts += [path for tower in anatomy.towers for path in (tower.embedding, tower.final_norm) if path]
    lost = sorted(name for name in missing if any(name.startswith(f"{part}.") for part in parts))
    if lost:
        raise ModelError(
            f"The weights of {source.id!r} do not fit its config: {len(lost)} parameters are missing from the files.",
            detail=f"Missing: {_some(lost)}; they would be random numbers.",
            hint="Check that config.json and the weights belong together.",
        )


@torch.no_grad()
def check_finite(model: nn.Module, name: str, spread: Spread | None = None) -> None:
    """Refuses NaN and infinities: one would make every statistic NaN. Weights that are not in memory are skipped."""
    bad: list[str] = []
    for key, held in (everything := [*model.named_parameters(), *model.named_buffers()]):
        weight = own_part(held)
        if weight.is_meta or not weight.numel() or weight.dtype not in set(DTYPES.values()):
            continue
        low, high = torch.aminmax(weight)  # one pass, no copy; NaN wins over numbers
        if not (low.isfinite() and high.isfinite()) and not _masks(key, weight):
            bad.append(key)
    bad = bad_anywhere([key for key, _ in everything], bad, spread)
    if bad:
        raise ModelError(
            f"{len(bad)} tensors of {name!r} hold NaN or infinity: {_some(bad)}.",
            detail="No statistic of such a model would be a number.",
            hint="Was it saved from a diverged training run, or in fp16 out of range? Open an earlier checkpoint.",
        )


def _some(names: list[str]) -> str:
    """The first three names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _masks(key: str, weight: torch.Tensor) -> bool:
    """Mask buffers may hold minus infinity by design; parameters and NaN never."""
    return "mask" in key.rpartition(".")[2] and not bool(torch.isnan(weight).any())


def load_tokenizer(source: Source, given: Any, wanted: bool, trust_remote_code: bool) -> Any:
    """The tokenizer: the one given (an object, folder or id), the model's own, or None if the model needs none."""
    if given is not None and not isinstance(given, str):
        return given
    if given is None and not wanted:
        return None
    from transformers import AutoTokenizer

    if given is None and source.folder is not None:
        check_tokenizer(source.folder, source.id)
    try:
        return AutoTokenizer.from_pretrained(
            given or source.location,
            revision=None if given else source.revision,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise explain(error, source, "tokenizer") from error
