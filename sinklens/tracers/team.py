"""Several processes that share one run: what each of them takes, and how word travels between them.

torchrun, or anything else that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, starts the processes. Each of them
opens the model and reads the prompts; batches are those of one process, and whoever is free takes the next one. What
was measured travels over gloo, on accelerators too: records are in the CPU's memory by then.

No process waits for another that is gone: each lets its heart beat in the common store, and who waits listens.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sinklens.core.errors import ResourceError, SinklensError

Piece = TypeVar("Piece")
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BEAT, PATIENCE, POLL = 1.0, 60.0, 0.05
"""Seconds between two heartbeats, without one until a process counts as gone, and between two looks."""


class Store(Protocol):
    """What is used of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def add(self, key: str, value: int) -> int: ...
    def check(self, keys: list[str]) -> bool: ...


class Elsewhere(SinklensError):
    """The run ended because of another process, which says why."""


class Gone(ResourceError):
    """Processes ended without a word: killed, by somebody or by the system because memory ran out."""

    def __init__(self, ranks: Sequence[int], size: int, saved: str = "", hint: str | None = None) -> None:
        self.ranks = tuple(ranks)
        named = " and ".join(f"Process {rank}" for rank in ranks)
        cause = "It was killed: by somebody, or by the system because memory ran out."
        super().__init__(
            f"{named} of {size} ended without a word.", detail=f"{cause} {saved}".strip(), hint=hint
        )


def asked_for(environment: dict[str, str] | None = None) -> bool:
    """Whether a launcher started this process as one of several."""
    given = dict(os.environ) if environment is None else environment
    return all(name in given for name in VARIABLES) and int(given["WORLD_SIZE"]) > 1


class Team:
    """The processes of one run, as one of them sees it. Use it in a `with`.

    Args:
        store: Shared by all.
        rank: This process, from 0; process 0 leads: it alone writes the run's result and says what came out.
        size: Number of processes.
        local_rank: Which of the processes of its machine it is.
        local_size: How many its machine has; all of them unless it is said.
        beating: A connection of its own to the store, for the thread that lets the heart beat.
        patience: Seconds without a heartbeat until a process counts as gone.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        local_rank: int = 0,
        *,
        local_size: int | None = None,
        beating: Store | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self.local_size = size if local_size is None else local_size
        self.rank, self.size, self.local_rank, self.patience = rank, size, local_rank, patience
        self._store, self._beating = store, beating or store
        self._quiet = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __repr__(self) -> str:
        return f"process {self.rank} of {self.size}"

    def __enter__(self) -> Team:
        self._store.set(f"who/{self.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        self._store.set(f"beat/{self.rank}", "0")
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._quiet.set()
        with self._reaching():
            self._store.set(f"left/{self.rank}", "" if kind is None else kind.__name__)
            if kind is not None and not issubclass(kind, Elsewhere):
                self._store.set("failed", str(self.rank))

    def speaks(self) -> bool:
        """Whether this is the first process that has an error to tell; the others keep silent."""
        try:
            return self._store.add("spoken", 1) == 1
        except RuntimeError:  # the store is gone, so nobody can tell
            return True

    # word -------------------------------------------------------------------------------------------------------

    def agree(self, name: str, said: Any, *, among: int | None = None) -> list[Any]:
        """What every process says to a question, as JSON, in order of rank. All of them must ask it.

        Args:
            among: Only the first so many are asked, of which this is one.
        """
        with self._reaching():
            self._store.set(f"{name}/{self.rank}", json.dumps(said))
        return [self.word(f"{name}/{rank}") for rank in range(self.size if among is None else among)]

    def told(self, name: str, said: Any = None) -> Any:
        """What the leader says; the others wait for it."""
        if self.leads:
            with self._reaching():
                self._store.set(name, json.dumps(said))
        return self.word(name)

    def word(self, key: str) -> Any:
        """What was said under a key, once it is there."""
        self.wait(lambda: self._store.check([key]))
        with self._reaching():
            return json.loads(self._store.get(key))

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until something holds.

        Raises:
            Elsewhere: Another process gave up.
            ResourceError: Another process is gone, or the store is.
        """
        while True:
            with self._reaching():
                if done():
                    return
            self.look()
            time.sleep(POLL)

    def look(self) -> None:
        """Make sure that nobody gave up or is gone."""
        with self._reaching():
            if self._store.check(["failed"]):
                raise Elsewhere(f"Process {int(self._store.get('failed'))} of {self.size} gave up.")
            silent = [rank for rank in range(self.size) if self._silent(rank)]
        if silent:
            raise Gone(silent, self.size)

    def missing(self) -> list[int]:
        """Processes of this machine that are gone without a word: killed, by the system if memory ran out."""
        found = []
        for rank in range(self.size):
            if not self._store.check([f"who/{rank}"]) or self._store.check([f"left/{rank}"]):
                continue
            host, pid = json.loads(self._store.get(f"who/{rank}"))
            if host == socket.gethostname() and not _alive(pid):
                found.append(rank)
        return found

    def _silent(self, rank: int) -> bool:
        if rank == self.rank or self._store.check([f"left/{rank}"]):
            return False
        key, now = f"beat/{rank}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        before, since = self._heard.get(rank, (None, now))
        if beat != before:
            self._heard[rank] = (beat, now)
            return False
        return now - since > self.patience

    def _beat(self) -> None:
        count = 0
        while not self._quiet.wait(BEAT):
            count += 1
            try:
                self._beating.set(f"beat/{self.rank}", str(count))
            except RuntimeError:  # whoever waits will say so
                return

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Errors of the store, said in words."""
        try:
            yield
        except RuntimeError as error:
            raise ResourceError(
                f"This is {self!r}, and it can no longer reach the others: "
                f"{(str(error).splitlines() or [''])[0][:120]}",
                detail="The launcher, or the process that holds the common store, has ended.",
            ) from error

    # work -------------------------------------------------------------------------------------------------------

    def share(self, name: str, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces that this process takes. All of them have the same pieces, and each is taken once."""
        while True:
            self.look()
            with self._reaching():
                taken = self._store.add(f"{name}/taken", 1) - 1
            if taken >= len(pieces):
                return
            yield pieces[taken]

    def count(self, name: str, more: int = 0) -> int:
        """A common counter, after adding to it."""
        with self._reaching():
            return self._store.add(f"{name}/count", more)

    def collect(self, name: str, mine: Sequence[bytes]) -> list[bytes] | None:
        """What all processes have, at the leader; None elsewhere. Sent over gloo."""
        import torch
        import torch.distributed as dist

        if not self.leads:
            with self._reaching():
                self._store.set(f"{name}/{self.rank}", json.dumps([len(piece) for piece in mine]))
                for piece in mine:
                    dist.send(torch.frombuffer(bytearray(piece), dtype=torch.uint8), 0)
            self.word(f"{name}/all")
            return None
        found = list(mine)
        for rank in range(1, self.size):
            for length in self.word(f"{name}/{rank}"):
                buffer = torch.empty(length, dtype=torch.uint8)
                try:
                    dist.recv(buffer, rank)
                except RuntimeError as error:
                    raise Gone([rank], self.size) from error
                found.append(buffer.numpy().tobytes())
        self.told(f"{name}/all", True)
        return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, but another user's
        return True
    try:  # where the system tells it: one that has ended stays listed until the launcher has looked
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (OSError, IndexError):
        return True


@contextmanager
def joined(*, patience: float = PATIENCE, on_devices: bool = False) -> Iterator[Team]:
    """The team that a launcher started; its process group is ended with the block.

    Args:
        on_devices: Whether tensors on accelerators travel too, as the parts of a model that is spread do.

    Raises:
        ResourceError: The others cannot be reached.
    """
    from importlib import import_module

    dist: Any = import_module("torch.distributed")
    store: Any
    try:
        rendezvous = import_module("torch.distributed.rendezvous").rendezvous
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=300))))
        ours = dist.PrefixStore("sinklens", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_devices and import_module("torch").cuda.is_available() else "gloo",
            store=dist.PrefixStore("gloo", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=30),
        )
    except RuntimeError as error:
        raise ResourceError(
            f"The processes of this run do not find each other: {(str(error).splitlines() or [''])[0][:160]}",
            hint="Start them with: torchrun --nproc-per-node N -m sinklens profile ...",
        ) from error
    beating = dist.PrefixStore("sinklens", store.clone())
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or size)
        with Team(ours, rank, size, local, local_size=here, beating=beating, patience=patience) as team:
            yield team
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
