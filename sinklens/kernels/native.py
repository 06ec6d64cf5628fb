"""The kernels in C (`kernels.c`), compiled once per machine where a C compiler exists; optional.

They make the statistics several times cheaper, because each row of logits is read while it is in cache. Without
them torch does the same: no compiler, an unusual platform, a failed build or `SINKLENS_NATIVE=0` leave the
torch path, whose results agree to float32 rounding.

The library is kept in the user's cache directory under a name made of the source, the flags, the processor and its own
content, so neither an upgrade nor a shared home directory nor half a file can load a wrong one. A directory or a file
that somebody else owns or may write to is not loaded from: then, and where the cache cannot be written, each process
builds its own in a temporary directory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")  # includes the others
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# What C reads and writes, whatever the caller's defaults are.
_PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_GIVEN = ("back", "count", "sink", "other", "tail", "probe", "column", "scratch")
_PER_ROW = ("logit", "top", "index", "product", "mean_back", "near", "own", "mass", "rest")
_PER_KEY = ("received", "received_log", "received_tail", "received_rows", "band", "band_rest")
_NUMBERS = (
    "stride",
    "other_stride",
    "scratch_stride",
    "columns",
    "place",
    "window",
    "band_first",
    "band_last",
    "keep",
    "first",
)
_SIZES = (
    "batch",
    "heads",
    "kv_heads",
    "queries",
    "keys",
    "dim",
    "value_dim",
    "packed_stride",
    "logits_stride",
    "tile",
    "line",
    "pieces",
    "causal",
)


class Asked(ctypes.Structure):
    """The C structure of the same fields: addresses, or NULL, then numbers."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_PER_ROW, *_PER_KEY, "half")),
        *((name, ctypes.c_long) for name in _NUMBERS),
    )


def available() -> bool:
    """Whether the compiled pass is there; the first call may compile it, which takes about a second."""
    return why_not() is None


def why_not() -> str | None:
    """Why the compiled pass is not there, in words; None where it is."""
    if os.environ.get("SINKLENS_NATIVE", "1") == "0":
        return "SINKLENS_NATIVE=0"
    built = library()
    if built is None:
        return "no C compiler was found" if _compiler() is None else "it could not be built, or was wrong"
    if not built.threaded and (threads := torch.get_num_threads()) > 1:
        return f"it was built without OpenMP, and torch uses {threads} threads"
    return None


def built() -> Library:
    """The library, where `available`."""
    found = library()
    if found is None:
        raise RuntimeError("The compiled kernels are not there; ask native.available() first.")
    return found


class Attention(ctypes.Structure):
    """The C structure of the same fields."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("query", "key", "value", "mask", "output", "packed", "logits")
        ),
        *((f"{name}_stride", ctypes.c_long * 3) for name in ("query", "key", "value", "mask", "output")),
        *((name, ctypes.c_long) for name in _SIZES),
        ("scale", ctypes.c_float),
    )


class Library(ctypes.CDLL):
    """The loaded library.

    Attributes:
        threaded: It was built with OpenMP.
        process: The one that loaded it.
    """

    threaded: bool
    process: int


def threads() -> int:
    """Threads that a call may use: those of torch, but one in a forked process, where OpenMP waits forever."""
    return torch.get_num_threads() if built().process == os.getpid() else 1


@functools.cache
def library() -> Library | None:
    """The compiled pass, built if need be, and checked against torch before it is trusted."""
    for openmp in ("-fopenmp", None):
        try:
            found = _loaded((*_FLAGS, openmp) if openmp else _FLAGS)
            for name in ("rows", "attend", "row_max", "between"):
                getattr(found, f"sinklens_{name}").restype = None
            found.sinklens_packed.restype = ctypes.c_long
            found.threaded, found.process = openmp is not None, os.getpid()
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            log.debug("row pass not built (%s): %s", openmp or "without OpenMP", error)
            continue
        if _weighs(found) and _attends(found):
            return found
        log.warning("The compiled kernels of sinklens are wrong on this machine and are not used.")
    return None


def _loaded(flags: tuple[str, ...]) -> Library:
    """The library from the cache, or built and left there if that can be.

    Raises:
        OSError, subprocess.SubprocessError: There is no compiler, or it fails, or there is no room.
    """
    sources = [path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.c"))]
    key = hashlib.sha256(repr((sources, flags, _processor())).encode()).hexdigest()[:16]
    folder = _cache()
    for kept in [] if folder is None else sorted(folder.glob(f"kernels-{key}-*.so")):
        if _intact(kept):
            return Library(str(kept))
    place = folder if folder is not None and os.access(folder, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="sinklens-") as scratch:
        # Made beside its place and moved there, so that another process never loads half a file.
        made = _compiled(flags, Path(scratch))
        if place is not None:
            made = made.replace(place / f"kernels-{key}-{_digest(made)}.so")
        return Library(str(made))  # once loaded, it may be deleted


def _compiled(flags: tuple[str, ...], folder: Path) -> Path:
    """The library, built in a folder."""
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    made = folder / "kernels.so"
    command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(made), "-lm"]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)
    made.chmod(0o600)
    return made


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def _cache() -> Path | None:
    """Where libraries are kept; None where there is no such place that is the user's alone."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (root if root.is_absolute() else Path.home() / ".cache") / "sinklens"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if _private(folder.stat()) else None
    except (OSError, RuntimeError) as error:  # the second where there is no home
        log.debug("no cache directory: %s", error)
        return None


def _private(found: os.stat_result) -> bool:
    """Whether it is the user's, and nobody else may write to it."""
    owner = getattr(os, "geteuid", lambda: found.st_uid)()
    return found.st_uid == owner and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _intact(kept: Path) -> bool:
    """Whether a library is the user's own and holds what it held when it was made."""
    try:
        found = kept.lstat()
        mine = stat.S_ISREG(found.st_mode) and _private(found)
        return mine and kept.stem.endswith(f"-{_digest(kept)}")
    except OSError:
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.system()} {platform.machine()} {platform.processor()} {flags}"


def _weighs(library: ctypes.CDLL) -> bool:
    """Whether the library computes a softmax of a block with an odd number of keys."""
    # No random numbers: the caller's generator must not move.
    logits = torch.linspace(-9.0, 4.0, 2 * 3 * 77, **_PLAIN).view(1, 2, 3, 77).sin().mul_(5.0)
    weights, scratch = logits.clone(), torch.empty(2, 80, **_PLAIN)
    asked = Asked(scratch=scratch.data_ptr(), scratch_stride=80, keep=1)
    library.sinklens_rows(
        ctypes.c_void_p(weights.data_ptr()), *map(ctypes.c_long, (2, 3, 77)), 0, 1, ctypes.byref(asked)
    )
    return torch.allclose(weights.double(), logits.double().softmax(-1), atol=1e-6, rtol=1e-5)


def _attends(library: ctypes.CDLL) -> bool:
    """Whether the library computes causal attention of widths and lengths that fill no vector."""
    heads, keys, dim, width, line = 2, 45, 9, 21, 80
    shapes = ((heads, keys, dim), (1, keys, dim), (1, keys, width))
    query, key, value = (torch.linspace(0.0, 70.0, math.prod(s), **_PLAIN).sin().view(s) for s in shapes)
    output = torch.empty(2, keys, width, **_PLAIN)
    call = Attention(causal=1, scale=1.0, tile=12, line=line, pieces=1, batch=1, heads=heads, kv_heads=1)
    call.queries, call.keys, call.dim, call.value_dim = keys, keys, dim, width
    for name, tensor in {"query": query, "key": key, "value": value, "output": output}.items():
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_stride", (0, *tensor.stride()[:2]))
    asked = Asked(scratch_stride=line, keep=2)
    call.packed_stride, call.logits_stride = (
        library.sinklens_packed(ctypes.byref(call), ctypes.byref(asked)),
        12 * line,
    )
    sizes = (call.packed_stride, 12 * line, 2 * line)
    packed, logits, scratch = (torch.empty(size, **_PLAIN) for size in sizes)
    call.packed, call.logits = packed.data_ptr(), logits.data_ptr()
    asked.scratch = scratch.data_ptr()
    library.sinklens_attend(ctypes.byref(call), 1, ctypes.byref(asked))
    # In double precision, which no autocast and no setting for products of the caller rounds.
    hidden = torch.full((keys, keys), -torch.inf, dtype=torch.float64, device="cpu").triu_(1)
    weights = (query.double() @ key.double().mT + hidden).softmax(-1)
    return torch.allclose(output.double(), weights @ value.double(), atol=1e-5, rtol=0)
