"""Machines that go, and come: what is done to a job whose workers are on two of them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cluster.local import LocalCluster
from orchestrator.job import run_in
from tests.audited import taken_of
from tests.chaos.work import NotSurvivedError, Work

_TOLD_S = 15.0
"""In which Ray knows whether a node is back."""


def moments_of(work: Work) -> Iterator[LocalCluster]:
    """Start the job; its machines, at each random moment at which it still runs."""
    assert work.cluster is not None
    work.start()
    while work.is_wanted and work.wait_for_random_moment():
        yield work.cluster


def node_killed(work: Work) -> None:
    """All that runs on the second machine, at once; another one takes its place, and then its end comes too."""
    second = "node1"
    for cluster in moments_of(work):
        work.note("a node's end")
        cluster.kill_node(second)
        second = cluster.add_node().name


def elastic(work: Work) -> None:
    """As before, but nobody takes its place until the job has gone on without it."""
    second = "node1"
    for cluster in moments_of(work):
        step = work.step()
        work.note("a node's end")
        cluster.kill_node(second)
        if not work.wait(lambda step=step: work.step() > step + 5):  # type: ignore[misc]
            return
        work.note("a node joins")
        second = cluster.add_node().name


def each_sample_once(work: Work) -> None:
    try:
        taken = taken_of(run_in(work.storage, work.name))
    except AssertionError as error:
        raise NotSurvivedError(f"the audit: {error}") from None
    alone = {one.step for one in taken} - {one.step for one in taken if one.worker}
    if work.faults and not alone:
        raise NotSurvivedError("no step was taken by one worker alone")


def node_cut(work: Work) -> None:
    """Off the network for 20 s, then for ever, then another one; what runs on it runs on."""
    second = "node1"
    for cluster in moments_of(work):
        if work.moments % 2:
            work.note("a node's network is cut for 20 s")
            cluster.cut(second, 20)
            until = time.monotonic() + _TOLD_S
            while (is_alive := cluster.status()[second]["alive"]) and time.monotonic() < until:
                time.sleep(1)
            if not is_alive:  # Ray has given it up, and ends what runs on it
                second = cluster.add_node().name
        else:
            work.note("a node's network is cut for ever")
            cluster.cut(second)
            second = cluster.add_node().name


def node_drained(work: Work) -> None:
    """With half a minute's notice, once, and then with 12 s; another one takes its place. None counts as a failure."""
    second = "node1"
    for cluster in moments_of(work):
        notice = 30 if work.moments == 1 and work.is_first else 12
        work.note(f"a node's notice of {notice} s")
        told, before = second, time.monotonic()
        cluster.drain(told, notice)
        second = cluster.add_node().name
        time.sleep(max(0.0, before + notice + 2 - time.monotonic()))
        cluster.kill_node(told)
        if "restart 1 of" in work.said():
            raise NotSurvivedError(f"a notice counted as a failure: {work.said()[-800:]}")


def head_gone(work: Work) -> None:
    """The head with its driver, and then all of the cluster; the same command on another cluster."""
    assert work.cluster is not None
    while work.is_wanted:
        process = work.start()
        if not work.wait_for_random_moment():
            return
        work.note("the head's end")
        work.cluster.kill_node("node0")
        process.wait()
        work.cluster.down()
        work.cluster.up()
