"""Machines that go, and come: what is done to a job whose workers are on two of them."""

from __future__ import annotations

import time

from orchestrator.job import run_in
from tests.audited import taken_of
from tests.chaos.work import NotSurvivedError, Work


def node_killed(work: Work) -> None:
    """All that runs on the second machine, at once; another one takes its place, and then its end comes too."""
    assert work.cluster is not None
    work.start()
    second = "node1"
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        work.note("a node's end")
        work.cluster.kill_node(second)
        second = work.cluster.add_node().name


def elastic(work: Work) -> None:
    """As before, but nobody takes its place until the job has gone on without it."""
    assert work.cluster is not None
    work.start()
    second = "node1"
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        step = work.step()
        work.note("a node's end")
        work.cluster.kill_node(second)
        if not work.wait(lambda step=step: work.step() > step + 5):  # type: ignore[misc]
            return
        work.note("a node joins")
        second = work.cluster.add_node().name


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
    assert work.cluster is not None
    work.start()
    second = "node1"
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        if work.moments % 2:
            work.note("a node's network is cut for 20 s")
            work.cluster.cut(second, 20)
        else:
            work.note("a node's network is cut for ever")
            work.cluster.cut(second)
            second = work.cluster.add_node().name


def node_drained(work: Work) -> None:
    """With half a minute's notice, once, and then with 12 s; another one takes its place. None counts as a failure."""
    assert work.cluster is not None
    work.start()
    second = "node1"
    while work.is_wanted:
        if not work.wait_for_random_moment():
            return
        notice = 30 if work.moments == 1 and work.is_first else 12
        work.note(f"a node's notice of {notice} s")
        told, before = second, time.monotonic()
        work.cluster.drain(told, notice)
        second = work.cluster.add_node().name
        time.sleep(max(0.0, before + notice + 2 - time.monotonic()))
        work.cluster.kill_node(told)
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
