"""Leases of runs in an object store, from nothing but writing, reading and listing.

pyarrow cannot write on a condition (its S3 ignores If-None-Match: https://github.com/apache/arrow/issues/44281), so
this does without. Who wants a run writes a ticket, and lists them all *afterwards*:

    <run>/.lease/00000007-3f2a91bc.json    number and token; owner, how often it was renewed, whether it was released

Of two that want the same run, whoever lists later sees the other's ticket; who sees one that it does not know to be
dead takes its own away and begins again. A ticket is dead once it was released, or not renewed for its `ttl_s`. That is
measured by the watcher's own clock, from when it first saw the ticket, plus the ticket's age then by the store's times
of modification; no clock of one machine is compared with another's. A ticket that is renewed while it is watched
belongs to somebody who works.

The next number is one more than the highest of all tickets. The last holder's ticket stays, released or dead, until the
next one has its own; so numbers grow. A number higher than its own tells a holder that somebody took it for dead.

Guaranteed on a store that shows in each read and listing what was written before (S3, GCS, Azure and MinIO do):
- no two hold the same run, unless one of them fails to renew for `ttl_s` (stopped, or cut off from the store);
- one of those that comes back is told so by `check`, and stops renewing.
Not guaranteed: that a holder which stops between `check` and a write for longer than `ttl_s` writes nothing. What it
commits then is passed over, as commits are read by number; a small file it could replace. On a store that lists late,
two can hold the same run at once; there too the commits of the lower number are passed over.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from orchestrator.job.asking import Answer
from orchestrator.job.locations import Location
from orchestrator.job.storage import Lease, run_is_busy, run_was_taken

FOLDER = ".lease"
_NAME = re.compile(r"(\d{8})-([0-9a-f]{8})\.json")
_RENEWALS = 6
"""In the time after which a ticket is dead."""
_POLL_S = 1.0
_GRAIN_S = 1.0
"""Stores tell times in seconds."""
_SKEW_S = 60.0
"""Between this machine's clock and the store's; for a look alone."""


class Ask(Protocol):
    """Calls what it is given until the store answers; raises `OrchestratorError` once that has taken too long."""

    def __call__(self, call: Callable[[], Answer], /) -> Answer: ...


@dataclass(frozen=True)
class Ticket:
    """What somebody wrote who wants a run, or has it."""

    name: str
    number: int
    owner: str
    ttl_s: float
    renewed: int = 0
    released: bool = False
    modified_ns: int = 0
    """By the store's clock; 0 where it does not tell."""

    def content(self) -> bytes:
        """As it stands in the store."""
        told = {"owner": self.owner, "ttl_s": self.ttl_s, "renewed": self.renewed, "released": self.released}
        return json.dumps(told).encode()


@dataclass
class Watched:
    """A ticket as it was first seen."""

    renewed: int
    since_s: float
    """By this machine's clock, which runs at the right speed, whatever it shows."""
    age_s: float
    """Since its last renewal then, by the store's clock alone."""


class Leases:
    """The tickets of one run. `ask` is how the store is asked."""

    def __init__(self, run: Location, ttl_s: float, ask: Ask) -> None:
        self._run = run
        self._folder = run.join(FOLDER)
        self._ttl_s = ttl_s
        self._ask = ask
        self._watched: dict[str, Watched] = {}

    # --- to hold ---

    @contextlib.contextmanager
    def held(self, name: str, owner: str) -> Iterator[Lease]:
        """The lease, renewed by a thread meanwhile. Raises `RefusedError` (`busy`)."""
        lease = self._acquired(name, owner)
        over = threading.Event()
        thread = threading.Thread(target=self._renew, args=(lease, over), daemon=True, name=f"lease of {name}")
        thread.start()
        try:
            yield lease
        finally:
            over.set()
            thread.join()
            with contextlib.suppress(Exception):  # it dies by itself
                self._put(self._ticket_of(lease, released=True))

    def forget(self, lease: Lease) -> None:
        """Remove the ticket of a lease that is over, so that nothing tells of it."""
        self._remove(_name_of(lease))

    def check(self, lease: Lease) -> None:
        """Return if nobody has taken the run. Raises `RefusedError` (`busy`)."""
        tickets = self._ask(self._listed)
        newer = [one for one in tickets if tickets[one][0] > lease.number]
        if newer:
            ticket = self._read(max(newer), *tickets[max(newer)])
            raise run_was_taken(self._run.text, lease, ticket.owner if ticket else "")
        if _name_of(lease) not in tickets:
            raise run_was_taken(self._run.text, lease)

    def holder(self) -> str:
        """Who works on the run by this machine's clock, '' if nobody does."""
        for ticket in reversed(self._tickets()):
            age_s = time.time() - ticket.modified_ns / 1e9
            if not ticket.released and (not ticket.modified_ns or age_s < ticket.ttl_s + _SKEW_S):
                return ticket.owner
        return ""

    def _renew(self, lease: Lease, over: threading.Event) -> None:
        renewed = 0
        while not over.wait(self._ttl_s / _RENEWALS):
            renewed += 1
            try:
                self._put(self._ticket_of(lease, renewed=renewed))
                newest = max(number for number, _ in self._listed().values())
            except Exception:  # the store is away: what is committed meanwhile says so
                continue
            if newest > lease.number:
                with contextlib.suppress(Exception):
                    self._put(self._ticket_of(lease, released=True))  # so that nobody waits for it
                return

    # --- to acquire ---

    def _acquired(self, name: str, owner: str) -> Lease:
        given_up_s = time.monotonic() + 3 * self._ttl_s
        while True:
            tickets = self._tickets()
            alive = [ticket for ticket in tickets if not self._is_dead(ticket)]
            working = [ticket for ticket in alive if ticket.renewed != self._watched[ticket.name].renewed]
            if working or (alive and time.monotonic() > given_up_s):
                raise run_is_busy(self._run.text, (working or alive)[-1].owner)
            lease = None if alive else self._alone(tickets, name, owner)
            if lease is not None:
                return lease
            # Of two that came at the same instant, one comes earlier the next time.
            time.sleep(random.uniform(0.5, 1) * min(_POLL_S, self._ttl_s / _RENEWALS))

    def _is_dead(self, ticket: Ticket) -> bool:
        if ticket.released:
            return True
        if ticket.name not in self._watched:
            age_s = self._age_s(ticket)
            self._watched[ticket.name] = Watched(ticket.renewed, time.monotonic(), age_s)
        watched = self._watched[ticket.name]
        since_s = time.monotonic() - watched.since_s + watched.age_s
        return ticket.renewed == watched.renewed and since_s > ticket.ttl_s

    def _age_s(self, ticket: Ticket) -> float:
        """At least so long ago it was renewed, by the time that the store gives to a file written now.

        Its own time is looked up after it was read: renewed in between, it is young, not old.
        """
        if not ticket.modified_ns:
            return 0.0
        probe = self._folder.join(f"now-{uuid.uuid4().hex[:8]}")
        self._ask(lambda: probe.write(b""))
        times_ns = {one.uri: one.modified_ns for one in self._ask(self._folder.entries)}
        self._ask(probe.delete)
        now_ns = max(times_ns.values(), default=0)
        return max(0.0, (now_ns - times_ns.get(ticket.name, now_ns)) / 1e9 - _GRAIN_S)

    def _alone(self, dead: list[Ticket], name: str, owner: str) -> Lease | None:
        """A lease for who writes a ticket and sees nobody else's; None where somebody came at the same instant."""
        number = max((ticket.number for ticket in dead), default=0) + 1
        lease = Lease(name, owner, number, uuid.uuid4().hex[:8])
        ticket = self._ticket_of(lease)
        known = {(one.name, one.renewed, one.released) for one in dead}
        try:
            self._ask(lambda: self._put(ticket))
            others = [one for one in self._tickets() if one.name != ticket.name]
            alone = all((one.name, one.renewed, one.released) in known for one in others)
        except BaseException:
            self._remove(ticket.name)
            raise
        for gone in others if alone else [ticket]:
            self._remove(gone.name)
        return lease if alone else None

    # --- what lies in the store ---

    def _listed(self) -> dict[str, tuple[int, int]]:
        """{name: (number, time of modification)} of all tickets."""
        entries = ((one, _NAME.fullmatch(one.uri)) for one in self._folder.entries())
        return {one.uri: (int(match[1]), one.modified_ns) for one, match in entries if match}

    def _tickets(self) -> list[Ticket]:
        """All of them, the lowest number first. One that vanished meanwhile is left out."""
        listed = self._ask(self._listed)
        tickets = (self._read(name, *listed[name]) for name in sorted(listed))
        return [ticket for ticket in tickets if ticket is not None]

    def _read(self, name: str, number: int, modified_ns: int) -> Ticket | None:
        try:
            told = json.loads(self._ask(self._folder.join(name).read))
            return Ticket(name, number, **told, modified_ns=modified_ns)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # not ours, or cut: it dies like one that is not renewed
            return Ticket(name, number, "another process", self._ttl_s, modified_ns=modified_ns)

    def _ticket_of(self, lease: Lease, renewed: int = 0, released: bool = False) -> Ticket:
        return Ticket(_name_of(lease), lease.number, lease.owner, self._ttl_s, renewed, released)

    def _put(self, ticket: Ticket) -> None:
        self._folder.join(ticket.name).write(ticket.content())

    def _remove(self, name: str) -> None:
        with contextlib.suppress(Exception):  # gone already; or it dies by itself
            self._folder.join(name).delete()


def _name_of(lease: Lease) -> str:
    return f"{lease.number:08d}-{lease.token}.json"
