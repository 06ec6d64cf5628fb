"""A team shares out pieces once each, agrees, and notices who is gone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from sinklens.core.errors import ResourceError
from sinklens.tracers import team as teams
from sinklens.tracers.team import Elsewhere, Gone, Team


def as_team(size: int, work: Any) -> list[Any]:
    """`work(team)` by every member at once; results or errors in order of rank."""
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def member(rank: int) -> Any:
        try:
            with Team(store, rank, size, patience=0.4) as team:
                return work(team)
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


def test_each_piece_is_taken_once() -> None:
    pieces = [f"piece {i}" for i in range(57)]
    taken = as_team(3, lambda team: list(team.share("pieces", pieces)))
    assert sorted(piece for part in taken for piece in part) == sorted(pieces)
    assert all(isinstance(part, list) for part in taken)


def test_everybody_hears_everybody_in_order_of_rank_and_all_hear_the_leader() -> None:
    def work(team: Team) -> Any:
        return team.agree("numbers", team.rank * 10), team.told("word", {"from": team.rank})

    assert as_team(3, work) == [([0, 10, 20], {"from": 0})] * 3


def test_who_waits_for_one_that_gave_up_gives_up_too() -> None:
    def work(team: Team) -> Any:
        if team.rank == 1:
            raise ValueError("no memory")
        return team.agree("numbers", team.rank)

    first, second, third = as_team(3, work)
    assert isinstance(second, ValueError)
    for other in (first, third):
        assert isinstance(other, Elsewhere)
        assert "Process 1 of 3 gave up" in str(other)


def test_a_process_whose_heart_stops_is_named_and_nobody_waits_for_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(teams, "BEAT", 0.05)
    asleep = threading.Event()

    def work(team: Team) -> Any:
        if team.rank == 2:
            team._quiet.set()  # no heartbeat any more, but not left either
            asleep.wait(20)
            return None
        try:
            return team.word("never said")
        finally:
            asleep.set()

    found = as_team(3, work)
    assert any(isinstance(error, Gone) and error.ranks == (2,) for error in found[:2]), found
    assert all(isinstance(error, Gone | Elsewhere) for error in found[:2])
    told = next(error for error in found if isinstance(error, Gone))
    assert "Process 2 of 3 ended without a word" in str(told)
    assert told.exit_code == 4


def test_one_voice_of_several() -> None:
    assert sorted(as_team(3, lambda team: team.speaks())) == [False, False, True]


def test_a_lost_store_is_an_error_in_words() -> None:
    class Lost:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: Any) -> Any:
                raise RuntimeError("Connection reset by peer")

            return fail

    team = Team(Lost(), 1, 2)  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="can no longer reach the others: Connection reset"):
        team.count("x")
    assert team.speaks()  # nobody can say who tells it, so everybody does


def test_several_processes_are_known_by_what_the_launcher_sets() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert teams.asked_for(given)
    assert not teams.asked_for({**given, "WORLD_SIZE": "1"})
    assert not teams.asked_for({"WORLD_SIZE": "8"})
