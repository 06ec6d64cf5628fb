"""What ran, with what, and what it cost: enough to run it again, nothing that tells who or where.

A manifest holds no host name, no user name and no absolute path. Arguments that are paths keep their last
part.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from .canonical import plain

SCHEMA = "sinklens/manifest/1"
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "datasets",
    "transformer-lens",
    "nnsight",
    "triton",
)


@dataclass
class Clock:
    """When a run started and what it took so far.

    Attributes:
        started: UTC.
        clock: Monotonic seconds at the start.
    """

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.clock


def build_manifest(
    *,
    clock: Clock | None = None,
    argv: Sequence[str] | None = None,
    seeds: Mapping[str, int] | None = None,
    device: str | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """The record of a run, as plain JSON data.

    Args:
        clock: Made when the run started; without one there are no times.
        argv: The command line, program first; None outside the command line.
        seeds: Name to seed, for every generator the run used.
        device: The torch device that ran the model, for instance `cuda:0`; its name is looked up.
        **sections: Further parts, kept as they are once made plain: `model`, `inputs`, `tracing`, ...
    """
    taken = {"schema", "sinklens", "command", "versions", "platform", "device", "seeds", "time", "memory"}
    if taken & sections.keys():
        raise ValueError(f"sections that the manifest fills itself: {sorted(taken & sections.keys())}")
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "sinklens": {"version": package_version("sinklens"), **git_state()},
        "command": None if argv is None else command_line(argv),
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": {"system": platform.system(), "machine": platform.machine()},
        "device": device_facts(device),
        "seeds": dict(seeds or {}),
        "time": None
        if clock is None
        else {"start_utc": clock.started.strftime("%Y-%m-%dT%H:%M:%SZ"), "wall_s": round(clock.seconds, 3)},
        "memory": {"peak_rss_bytes": peak_memory(), "peak_cuda_bytes": _peak_cuda()},
        **sections,
    }
    found = plain(manifest)
    assert isinstance(found, dict)
    return found


def package_version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required_versions(name: str) -> SpecifierSet | None:
    """The versions of a distribution that sinklens, or an extra of it, asks for; None if it asks for none."""
    wanted = [Requirement(line) for line in metadata.requires("sinklens") or ()]
    same = [one.specifier for one in wanted if canonicalize_name(one.name) == canonicalize_name(name)]
    return same[0] if same else None


def _versions() -> dict[str, str]:
    found = {name: package_version(name) for name in PACKAGES}
    return {name: version for name, version in found.items() if version is not None}


def git_state(root: Path | None = None) -> dict[str, Any]:
    """`commit` and `modified` of the checkout sinklens runs from; both None for an installed package."""
    root = Path(__file__).resolve().parents[2] if root is None else root
    unknown = {"commit": None, "modified": None}
    if not (root / ".git").exists():
        return unknown
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return unknown
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "modified": None if status is None else bool(status.strip())}


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def command_line(argv: Sequence[str]) -> list[str]:
    """The arguments, without folders: the program's name, and absolute or home paths by their last part."""
    if not argv:
        return []
    program = _last_part(argv[0]).removesuffix(".exe")
    # `python -m sinklens` runs as __main__.py; what is written down should run when typed again.
    return [
        "sinklens" if program == "__main__.py" else program,
        *(_private(argument) for argument in argv[1:]),
    ]


def _private(argument: str) -> str:
    name, mark, value = argument.partition("=")
    if mark and name.startswith("-"):
        return f"{name}={_private(value)}"
    prefix, mark, value = argument.partition(":")
    if mark and prefix in ("hf", "corpus"):
        return f"{prefix}:{_private(value)}"
    if argument.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", argument):
        return _last_part(argument)
    return argument


def _last_part(path: str) -> str:
    kind = PureWindowsPath if "\\" in path else PurePosixPath
    return kind(path).name or path


def device_facts(device: str | None) -> dict[str, Any]:
    """The processor's model, its threads, and the accelerator if `device` is one."""
    facts: dict[str, Any] = {"name": device, "cpu": cpu_model()}
    torch = sys.modules.get("torch")  # nothing ran on a device if torch was never imported
    if torch is None:
        return facts
    facts["threads"] = torch.get_num_threads()
    if device is not None and device.startswith("cuda") and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return facts


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's marketing name, or what the platform module knows."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or None


def peak_memory() -> int | None:
    """Largest resident size of this process so far, in bytes; None where the system does not tell it."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux, bytes on macOS


def _peak_cuda() -> int | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


# What differs between any two runs and says nothing about the difference of their results.
VOLATILE = ("time", "memory", "command", "processes")


def manifest_diff(
    a: Mapping[str, Any], b: Mapping[str, Any], *, ignore: Sequence[str] = VOLATILE
) -> dict[str, tuple[Any, Any]]:
    """What differs between two manifests: dotted key to the two values, None where a key is missing.

    Args:
        ignore: Top-level or dotted keys to leave out, with everything below them.
    """
    left, right = dict(_leaves(a)), dict(_leaves(b))
    keys = [*left, *(key for key in right if key not in left)]
    return {
        key: (left.get(key), right.get(key))
        for key in keys
        if left.get(key) != right.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in ignore)
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value; lists are leaves, since their items have no names to compare by."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
