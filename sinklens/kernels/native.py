"""The row pass in C (`rows.c`), compiled once per machine where a C compiler exists; torch does the same without.

It makes the statistics several times cheaper, because each row of logits is read once while it is in cache. It is
optional in every respect: no compiler, an unusual platform, a failed build or `SINKLENS_NATIVE=0` leave the torch
path, whose results agree to float32 rounding. The library is kept in the user's cache directory under a name made
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
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_FIELDS = ("back", "count", "sink", "logit", "top", "index", "product", "mean_back", "received")


class _Asked(ctypes.Structure):
    """The C structure of the same fields: addresses, or NULL."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _FIELDS),
        ("received_stride", ctypes.c_long),
        ("half", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class RowResults:
    """What the pass found per row; None where it was not asked."""

    peak: tuple[Int[Tensor, "b h r"], Float[Tensor, "b h r"], Float[Tensor, "b h r"]] | None = None
    """Key, logit and weight of the largest entry."""
    product: Float[Tensor, "b h r"] | None = None
    mean_back: Float[Tensor, "b h r"] | None = None


@dataclass(frozen=True)
class RowRequest:
    """What the pass is asked for.

    Attributes:
        known: The logits are logarithms to base 2 of the weights; else they are in nats, to be normalised.
        peak: Largest logit, its weight and key.
        product: Sum of weight times logit.
        back: A number per key, whose weighted sum is wanted.
        received: `[b, h, key]`, any strides with heads evenly apart: weighted sums over rows are added to it.
        count: Weight of each row in `received`, `[b, h, r]`; None for 1.
        sinks: Learned sink logit per head `[b, h]`, whose share leaves `received`; only if not `known`.
        half: Contiguous bfloat16 `[b, h, r, k]` that gets the weights too; only if not `known`.
    """

    known: bool = False
    peak: bool = False
    product: bool = False
    back: Float[Tensor, " k"] | None = None
    received: Float[Tensor, "b h k"] | None = None
    count: Float[Tensor, "b h r"] | None = None
    sinks: Float[Tensor, "b h"] | None = None
    half: Float[Tensor, "b h r k"] | None = None


def available() -> bool:
    """Whether the compiled pass is there; the first call may compile it, which takes about a second."""
    if os.environ.get("SINKLENS_NATIVE", "1") == "0":
        return False
    library = _library()
    return library is not None and (library.threaded or torch.get_num_threads() == 1)


def pass_rows(logits: Float[Tensor, "b h r k"], request: RowRequest) -> RowResults:
    """Turn contiguous float32 logits into weights, in place, and take what is asked on the way."""
    library = _library()
    if library is None:
        raise RuntimeError("pass_rows needs available()")
    b, h, r, k = logits.shape
    found: dict[str, Tensor] = {}
    names = (*("logit", "top", "index") * request.peak, *("product",) * request.product)
    for name in (*names, *("mean_back",) * (request.back is not None)):
        found[name] = logits.new_empty(b, h, r, dtype=torch.int64 if name == "index" else None)
    count = None if request.count is None else request.count.expand(b, h, r).contiguous()
    sinks = None if request.sinks is None else request.sinks.expand(b, h).contiguous()
    given = {
        "back": request.back,
        "count": count,
        "sink": sinks,
        "received": request.received,
        "half": request.half,
        **found,
    }
    asked = _Asked(**{name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None})
    if request.received is not None:
        asked.received_stride = request.received.stride(1)
    library.sinklens_rows(
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_long, (b * h, r, k)),
        int(request.known),
        torch.get_num_threads(),
        ctypes.byref(asked),
    )
    peak = (found["index"], found["logit"], found["top"]) if request.peak else None
    return RowResults(peak, found.get("product"), found.get("mean_back"))


class _Library(ctypes.CDLL):
    """The loaded library; `threaded` if it was built with OpenMP."""

    threaded: bool


@functools.cache
def _library() -> _Library | None:
    """The compiled pass, built if need be, and checked against torch before it is trusted."""
    for openmp in ("-fopenmp", None):
        try:
            library = _Library(str(_built((*_FLAGS, openmp) if openmp else _FLAGS)))
            library.sinklens_rows.restype = None
            library.threaded = openmp is not None
        except (OSError, subprocess.SubprocessError, AttributeError) as error:
            log.debug("row pass not built (%s): %s", openmp or "without OpenMP", error)
            continue
        if _agrees(library):
            return library
        log.warning("The compiled row pass of sinklens is wrong on this machine and is not used.")
    return None


def _built(flags: tuple[str, ...]) -> Path:
    """Path of the shared library.

    Raises:
        OSError, subprocess.SubprocessError: There is no compiler, or it fails, or the cache cannot be written.
    """
    key = hashlib.sha256(repr((_SOURCE.read_bytes(), flags, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sinklens"
    target = folder / f"rows-{key}.so"
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


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library computes a softmax of a block with an odd number of keys."""
    # No random numbers: the caller's generator must not move.
    logits = torch.linspace(-9.0, 4.0, 2 * 3 * 77).view(1, 2, 3, 77).sin().mul_(5.0)
    weights = logits.clone()
    library.sinklens_rows(
        ctypes.c_void_p(weights.data_ptr()), *map(ctypes.c_long, (2, 3, 77)), 0, 1, ctypes.byref(_Asked())
    )
    return torch.allclose(weights, logits.softmax(-1), atol=1e-6, rtol=1e-5)
