"""The kernels in C (`kernels.c`), compiled once per machine where a C compiler exists; optional.

They make the statistics several times cheaper, because each row of logits is read while it is in cache. Without
them torch does the same: no compiler, an unusual platform, a failed build or `SINKLENS_NATIVE=0` leave the
torch path, whose results agree to float32 rounding. The library is kept in the user's cache directory under a name made
of the source, the flags and the processor, so neither an upgrade nor a shared home directory can load a wrong one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("kernels.c")  # includes the others
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
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
    if os.environ.get("SINKLENS_NATIVE", "1") == "0":
        return False
    built = library()
    return built is not None and (built.threaded or torch.get_num_threads() == 1)


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
    """The loaded library; `threaded` if it was built with OpenMP."""

    threaded: bool


@functools.cache
def library() -> Library | None:
    """The compiled pass, built if need be, and checked against torch before it is trusted."""
    for openmp in ("-fopenmp", None):
        try:
            found = Library(str(_built((*_FLAGS, openmp) if openmp else _FLAGS)))
            for name in ("rows", "attend", "row_max", "between"):
                getattr(found, f"sinklens_{name}").restype = None
            found.sinklens_packed.restype = ctypes.c_long
            found.threaded = openmp is not None
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            log.debug("row pass not built (%s): %s", openmp or "without OpenMP", error)
            continue
        if _weighs(found) and _attends(found):
            return found
        log.warning("The compiled kernels of sinklens are wrong on this machine and are not used.")
    return None


def _built(flags: tuple[str, ...]) -> Path:
    """Path of the shared library.

    Raises:
        OSError, subprocess.SubprocessError: There is no compiler, or it fails, or the cache cannot be written.
    """
    sources = [path.read_bytes() for path in sorted(_SOURCE.parent.glob("*.c"))]
    key = hashlib.sha256(repr((sources, flags, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinklens"
    target = folder / f"kernels-{key}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # Made beside its place and moved there, so that another process never loads half a file.
        made = Path(scratch) / target.name
        command = [*compiler.split(), *flags, str(_SOURCE), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        made.replace(target)
    return target


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
    logits = torch.linspace(-9.0, 4.0, 2 * 3 * 77).view(1, 2, 3, 77).sin().mul_(5.0)
    weights, scratch = logits.clone(), torch.empty(2, 80)
    asked = Asked(scratch=scratch.data_ptr(), scratch_stride=80, keep=1)
    library.sinklens_rows(
        ctypes.c_void_p(weights.data_ptr()), *map(ctypes.c_long, (2, 3, 77)), 0, 1, ctypes.byref(asked)
    )
    return torch.allclose(weights, logits.softmax(-1), atol=1e-6, rtol=1e-5)


def _attends(library: ctypes.CDLL) -> bool:
    """Whether the library computes causal attention of widths and lengths that fill no vector."""
    heads, keys, dim, width, line = 2, 45, 9, 21, 80
    query, key = (torch.linspace(0.0, 70.0, n * keys * dim).sin().view(n, keys, dim) for n in (heads, 1))
    value, output = (
        torch.linspace(0.0, 50.0, keys * width).cos().view(1, keys, width),
        torch.empty(2, keys, width),
    )
    call = Attention(causal=1, scale=1.0, tile=12, line=line, pieces=1, batch=1, heads=heads, kv_heads=1)
    call.queries, call.keys, call.dim, call.value_dim = keys, keys, dim, width
    for name, tensor in {"query": query, "key": key, "value": value, "output": output}.items():
        setattr(call, name, tensor.data_ptr())
        setattr(call, f"{name}_stride", (0, *tensor.stride()[:2]))
    call.packed_stride, call.logits_stride = library.sinklens_packed(ctypes.byref(call)), 12 * line
    packed, logits, scratch = torch.empty(call.packed_stride), torch.empty(12 * line), torch.empty(2, line)
    call.packed, call.logits = packed.data_ptr(), logits.data_ptr()
    asked = Asked(scratch=scratch.data_ptr(), scratch_stride=line, keep=2)
    library.sinklens_attend(ctypes.byref(call), 1, ctypes.byref(asked))
    truth = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
    return torch.allclose(output, truth, atol=1e-5, rtol=0)
