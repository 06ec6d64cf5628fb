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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .workspace import workspace

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("rows.c")
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
)


class _Asked(ctypes.Structure):
    """The C structure of the same fields: addresses, or NULL, then numbers."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_PER_ROW, *_PER_KEY, "half")),
        *((name, ctypes.c_long) for name in _NUMBERS),
    )


@dataclass(frozen=True)
class RowResults:
    """What the pass found per row; None where it was not asked."""

    peak: tuple[Int[Tensor, "b h r"], Float[Tensor, "b h r"], Float[Tensor, "b h r"]] | None = None
    """Key, logit and weight of the largest entry."""
    product: Float[Tensor, "b h r"] | None = None
    """Sum of weight times its logarithm (nats)."""
    mean_back: Float[Tensor, "b h r"] | None = None
    near: Float[Tensor, "b h r"] | None = None
    own: Float[Tensor, "b h r"] | None = None
    mass: Float[Tensor, "b h r column"] | None = None


@dataclass(frozen=True)
class RowRequest:
    """What the pass is asked for.

    Attributes:
        known: The logits are logarithms to base 2 of the weights; else they are in nats, to be normalised.
        keep: Turn the logits into weights, in place; else they stay as they are.
        place: Index of the first row's own key.
        peak: Largest logit, its weight and key.
        product: Sum of weight times its logarithm.
        own: Weight of each row's own key.
        window: Sum of weight times `relu(window - distance)`; None for not.
        back: A number per key, whose weighted sum is wanted.
        columns: Keys whose weights are wanted, `[b, h, column]`; those outside of the block weigh 0.
        sums: Sums over rows that are added to `[b, h, key]`, by name (`_PER_KEY`). All have the same strides, with
            heads evenly apart.
        tail, probe: Rows of `received_tail` and `received_rows`, `[b, r]`.
        band: First and last distance of the rows of `band` and `band_rest` from the key.
        other: `[1|b h, key]`, 1 outside of the group that `band_rest` leaves out, 0 inside.
        sink_mass: Mass of each row on a learned sink, `[b, h, r]`, for `band_rest` if `known`; None for 0.
        count: Weight of each row in the sums over rows, `[b, h, r]`; None for 1.
        sinks: Learned sink logit per head `[b, h]`, whose share leaves those sums; only if not `known`.
        half: Contiguous bfloat16 `[b, h, r, k]` that gets the weights too; only if not `known`.
    """

    known: bool = False
    keep: bool = True
    place: int = 0
    peak: bool = False
    product: bool = False
    own: bool = False
    window: int | None = None
    back: Float[Tensor, " k"] | None = None
    columns: Int[Tensor, "b h column"] | None = None
    sums: Mapping[str, Float[Tensor, "b h k"]] = field(default_factory=dict)
    tail: Bool[Tensor, "b r"] | None = None
    probe: Bool[Tensor, "b r"] | None = None
    band: tuple[int, int] = (0, 0)
    other: Float[Tensor, "heads k"] | None = None
    sink_mass: Float[Tensor, "b h r"] | None = None
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
    """Take what is asked from contiguous float32 logits, each row while it is in cache."""
    library = _library()
    if library is None:
        raise RuntimeError("pass_rows needs available()")
    b, h, r, k = logits.shape
    threads = torch.get_num_threads()
    found = _room(logits, request)
    given = {**_given(logits.shape, request), **request.sums, **found}
    # Room for one row of weights and one of their logarithms per thread; rows start at cache lines.
    stride = -(-k // 16) * 16
    given["scratch"] = workspace().take("rows", (threads, 2, stride), torch.float32, logits.device)
    asked = _Asked(**{name: tensor.data_ptr() for name, tensor in given.items() if tensor is not None})
    asked.scratch_stride, asked.place, asked.keep = stride, request.place, request.keep
    asked.stride = next((tensor.stride(1) for tensor in request.sums.values()), 0)
    asked.columns = 0 if request.columns is None else request.columns.shape[2]
    asked.window = request.window or 0
    asked.band_first, asked.band_last = request.band
    if request.other is not None:
        asked.other_stride = request.other.stride(0) if request.other.shape[0] > 1 else 0
    library.sinklens_rows(
        ctypes.c_void_p(logits.data_ptr()),
        *map(ctypes.c_long, (b * h, r, k)),
        int(request.known),
        threads,
        ctypes.byref(asked),
    )
    peak = (found["index"], found["logit"], found["top"]) if request.peak else None
    rest = (found.get(name) for name in ("product", "mean_back", "near", "own", "mass"))
    return RowResults(peak, *rest)


def _room(logits: Tensor, request: RowRequest) -> dict[str, Tensor]:
    """Where the results per row go."""
    shape = logits.shape[:3]
    asked = {
        "product": request.product,
        "mean_back": request.back is not None,
        "near": request.window is not None,
        "own": request.own,
        **dict.fromkeys(("logit", "top", "index"), request.peak),
    }
    found = {
        name: logits.new_empty(shape, dtype=torch.int64 if name == "index" else None)
        for name, wanted in asked.items()
        if wanted
    }
    if request.columns is not None:
        found["mass"] = logits.new_empty(*shape, request.columns.shape[2])
    if "band_rest" in request.sums:
        mass = request.sink_mass
        found["rest"] = logits.new_zeros(shape) if mass is None else mass.contiguous().clone()
    return found


def _given(shape: torch.Size, request: RowRequest) -> dict[str, Tensor | None]:
    """What the pass reads besides the logits, laid out as it expects."""
    b, h, r, _ = shape

    def spread(tensor: Tensor | None, *sizes: int) -> Tensor | None:
        return None if tensor is None else tensor.expand(sizes).contiguous()

    return {
        "back": request.back,
        "other": request.other,
        "half": request.half,
        "count": spread(request.count, b, h, r),
        "sink": spread(request.sinks, b, h),
        "column": None if request.columns is None else request.columns.contiguous(),
        "tail": spread(None if request.tail is None else request.tail[:, None], b, h, r),
        "probe": spread(None if request.probe is None else request.probe[:, None], b, h, r),
    }


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
    weights, scratch = logits.clone(), torch.empty(2, 80)
    asked = _Asked(scratch=scratch.data_ptr(), scratch_stride=80, keep=1)
    library.sinklens_rows(
        ctypes.c_void_p(weights.data_ptr()), *map(ctypes.c_long, (2, 3, 77)), 0, 1, ctypes.byref(asked)
    )
    return torch.allclose(weights, logits.softmax(-1), atol=1e-6, rtol=1e-5)
