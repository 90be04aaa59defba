"""The order of requests in which two want one run: whatever it is, one has it at most."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.fs
import pytest
from hypothesis import given, settings, strategies as st

from orchestrator.errors import RefusedError
from orchestrator.job import Lease, leases
from orchestrator.job.leases import Leases
from orchestrator.job.locations import Location

MANY_S = 1000.0


class Over(BaseException):
    """No further request of this test's is answered."""


class Actor:
    """A thread whose requests to the store are answered when the schedule says so."""

    def __init__(self, work: Callable[[Actor], None]) -> None:
        self._go, self.waits = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = self.over = False
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self.waits.acquire()

    def _run(self, work: Callable[[Actor], None]) -> None:
        try:
            work(self)
        except (Over, RefusedError):
            pass
        finally:
            self.ended = True
            self.waits.release()

    def turn(self) -> None:
        """Called before each request."""
        self.waits.release()
        self._go.acquire()
        if self.over:
            raise Over

    def step(self) -> None:
        """Let it do one request, up to the next."""
        if not self.ended:
            self._go.release()
            self.waits.acquire()

    def end(self) -> None:
        self.over = True
        while not self.ended:
            self.step()
        self._thread.join()


class Scheduled(Location):
    """A place in a store as one actor sees it."""

    actor: Actor

    def join(self, uri: str) -> Location:
        place = Scheduled(f"{self.text}/{uri}", self.fs, f"{self.path}/{uri}")
        object.__setattr__(place, "actor", self.actor)
        return place

    def _infos(self, recursive: bool) -> Any:
        self.actor.turn()
        return super()._infos(recursive)

    def read(self) -> bytes:
        self.actor.turn()
        return super().read()

    def write(self, content: bytes) -> None:
        self.actor.turn()
        super().write(content)

    def delete(self) -> None:
        self.actor.turn()
        super().delete()


def leases_of(folder: str, actor: Actor, ttl_s: float) -> Leases:
    place = Scheduled(folder, pyarrow.fs.LocalFileSystem(), folder)
    object.__setattr__(place, "actor", actor)
    return Leases(place, ttl_s, lambda call: call())


def played(schedule: list[int], *works: Callable[[Actor], None]) -> None:
    actors = [Actor(work) for work in works]
    for number in schedule:
        actors[number].step()
    for actor in actors:
        actor.end()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_POLL_S", 0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=60, max_size=60), st.booleans())
def test_of_three_that_come_at_the_same_instant_one_has_the_lease(schedule: list[int], after_another: bool) -> None:
    acquired: list[Lease] = []
    with TemporaryDirectory() as folder:
        if after_another:
            (Path(folder) / ".lease").mkdir()
            (Path(folder) / ".lease" / "00000007-00000000.json").write_text(
                '{"owner": "before", "ttl_s": 1, "renewed": 3, "released": true}'
            )

        def work(actor: Actor) -> None:
            acquired.append(leases_of(folder, actor, MANY_S)._acquired("run", "somebody"))

        played(schedule, work, work, work)
        assert len(acquired) <= 1
        assert all(lease.number == (8 if after_another else 1) for lease in acquired)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=40, max_size=40), st.booleans())
def test_a_holder_that_was_taken_for_dead_keeps_the_lease_or_loses_it(schedule: list[int], was_watched: bool) -> None:
    """It renews at last while another one, which watched it or sees an old time, takes it over: never do both go on."""
    ttl_s = 0.0 if was_watched else 100.0
    goes_on: list[str] = []
    with TemporaryDirectory() as folder:
        old = Lease("run", "the older", 7, "0" * 8)

        def renewing(actor: Actor) -> None:
            held = leases_of(folder, actor, ttl_s)
            held._put(held._ticket_of(old, renewed=1))
            held.check(old)
            goes_on.append("the older")

        def taking(actor: Actor) -> None:
            wanted = leases_of(folder, actor, ttl_s)
            wanted._watched = watched
            wanted._acquired("run", "the newer")
            goes_on.append("the newer")

        first = Leases(Location(folder, pyarrow.fs.LocalFileSystem(), folder), ttl_s, lambda call: call())
        first._put(first._ticket_of(old))
        os.utime(Path(folder) / ".lease" / "00000007-00000000.json", (1, 1))
        assert all(first._is_dead(ticket) for ticket in first._tickets())
        watched = first._watched if was_watched else {}
        played(schedule, renewing, taking)
        assert len(goes_on) <= 1


def test_a_ticket_that_cannot_be_understood_dies_like_others(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    for i, text in enumerate(["", "[]", '{"owner": 1}', "{"]):
        (tmp_path / ".lease" / f"0000000{i}-00000000.json").write_text(text)
    wanted = Leases(Location("runs/run", pyarrow.fs.LocalFileSystem(), str(tmp_path)), 0.05, lambda call: call())
    with wanted.held("run", "me") as lease:
        assert lease.number == 4
        assert len(list((tmp_path / ".lease").iterdir())) == 1
