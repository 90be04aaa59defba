"""What a cluster offers and what is made of it: devices, threads, waiting; where events are kept; who stops whom.

A GPU is a number to Ray's scheduler: it is enough to say that a node has some.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import orchestrator
from orchestrator.errors import RefusedError, TrainingError
from orchestrator.job import Event, HeldRun, Lease, Noted, Plan
from tests.held import leased

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def plan(tiny_resnet: Path, flat_digits: Path) -> Plan:
    """For a cluster that is there."""
    return orchestrator.plan(
        backbone=str(tiny_resnet), data=str(flat_digits), method="full", scaling={"num_workers": 2, "address": "auto"}
    )


@pytest.fixture(scope="module")
def _two_nodes() -> Iterator[None]:
    """Nodes of 2 and of 4 cores, one of them with a GPU by its word."""
    import ray
    from ray.cluster_utils import Cluster

    hidden = os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray takes no node's word for more than that
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=4, num_gpus=1, resources={"accelerator_type:L4": 1})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()
    if hidden is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = hidden


def with_scaling(plan: Plan, **scaling: object) -> Plan:
    job = plan.job.model_copy(update={"scaling": plan.job.scaling.model_copy(update=scaling)})
    return plan.model_copy(update={"job": job, "num_workers": job.scaling.num_workers})


@pytest.mark.usefixtures("_two_nodes")
def test_what_a_cluster_offers(plan: Plan) -> None:
    from orchestrator.distributed import offer

    assert plan.threads_per_worker == 0
    notes: list[Event] = []
    given = offer.offer_of(plan, notes.append)  # one GPU for two workers: said, and not taken in silence
    assert notes == [
        Noted(
            "2 processes want a GPU each, and the cluster has 1: all run on CPUs; for the GPUs, lower "
            "scaling.num_workers to 1"
        )
    ]
    assert (given["use_gpu"], given["threads"]) == (False, 2)
    assert offer.offer_of(with_scaling(plan, num_workers=1), notes.append)["use_gpu"]
    assert offer.offer_of(with_scaling(plan, num_workers=1), notes.append)["threads"] == 4
    assert not offer.offer_of(with_scaling(plan, num_workers=1, device="cpu"), notes.append)["use_gpu"]
    assert notes[1:] == [Noted("device auto: on 1 of the cluster's 1 GPUs")] * 2
    with pytest.raises(RefusedError, match="2 processes want a GPU each, and the cluster has 1") as caught:
        offer.offer_of(with_scaling(plan, device="gpu"), notes.append)
    assert caught.value.mend
    wide = with_scaling(plan, num_workers=1).model_copy(update={"threads_per_worker": 5})
    with pytest.raises(RefusedError, match="the largest node has 4 CPUs"):  # there are 6, on two nodes
        offer.offer_of(wide, notes.append)
    helped = with_scaling(plan, num_workers=1, device="cpu").model_copy(update={"num_extractors": 3})
    assert offer.offer_of(helped, notes.append)["threads"] == 2  # so that an extractor has a place beside the worker
    with pytest.raises(RefusedError, match="7 workers need 7 CPUs"):
        offer.offer_of(with_scaling(plan, num_workers=7), notes.append)


@pytest.mark.usefixtures("_two_nodes")
def test_of_an_elastic_group_the_fewest_workers_want_a_place(plan: Plan) -> None:
    from orchestrator.distributed import offer

    notes: list[Event] = []
    given = offer.offer_of(with_scaling(plan, num_workers=16, min_workers=2, device="cpu"), notes.append)
    assert (given["threads"], notes) == (2, [])
    with pytest.raises(RefusedError, match="7 workers need 7 CPUs"):
        offer.offer_of(with_scaling(plan, num_workers=16, min_workers=7, device="cpu"), notes.append)


@pytest.mark.usefixtures("_two_nodes")
@pytest.mark.parametrize(("most", "threads"), [(1, 4), (2, 2), (3, 1), (16, 1)])
def test_an_elastic_group_leaves_no_gpu_without_cores(plan: Plan, most: int, threads: int) -> None:
    """The node with a GPU has four cores; four workers share it."""
    from orchestrator.distributed import offer

    elastic = with_scaling(plan, num_workers=most, min_workers=1, gpus_per_worker=0.25)
    assert offer.offer_of(elastic, print) == {"use_gpu": True, "threads": threads, "extractor_threads": threads}


def test_a_node_that_joins_with_an_old_run_of_that_name_does_not_see_the_run(tmp_path: Path) -> None:
    """It would begin with a checkpoint of its own."""
    from orchestrator.distributed.shared_storage import NotSeenError, require_seen

    old = leased(tmp_path / "there/a")
    require_seen(old, "10.0.0.7")
    run = HeldRun(old.storage, Lease("a", "this driver", 1, "of ours"))
    with pytest.raises(NotSeenError, match=r"the node 10\.0\.0\.7 does not see the run in .*there"):
        require_seen(run, "10.0.0.7")


@pytest.mark.usefixtures("_two_nodes")
def test_a_search_of_elastic_groups_has_room_where_the_fewest_workers_have(plan: Plan) -> None:
    from orchestrator.tuning.room import Room, room_for

    elastic = with_scaling(plan, num_workers=16, min_workers=3, device="cpu")
    assert room_for(elastic, 8, None) == Room(2, 1, use_gpu=False)


@pytest.mark.usefixtures("_two_nodes")
def test_a_search_asks_at_once_for_all_nodes_that_can_come(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.distributed import offer
    from orchestrator.tuning.room import Room, room_for

    monkeypatch.setenv(offer.NODE_TYPES, json.dumps([{"resources": {"CPU": 4, "GPU": 1}, "max": 8}]))
    assert room_for(with_scaling(plan, num_workers=1), 8, None) == Room(8, 4, use_gpu=True, num_pending=7)


@pytest.mark.usefixtures("_two_nodes")
def test_gpus_are_shared_and_of_one_kind(plan: Plan) -> None:
    from orchestrator.distributed import offer

    notes: list[Event] = []
    shared = with_scaling(plan, gpus_per_worker=0.5)
    assert offer.offer_of(shared, notes.append)["use_gpu"]
    assert offer.resources_of(shared, 2, use_gpu=True) == {"CPU": 2, "GPU": 0.5}
    with pytest.raises(RefusedError, match=r"3 processes want 0\.5 of a GPU each, and the cluster has 1"):
        offer.offer_of(with_scaling(plan, num_workers=3, gpus_per_worker=0.5, device="gpu"), notes.append)
    uneven = with_scaling(plan, gpus_per_worker=0.4, num_workers=3)  # two fit on a GPU, and none on what is left
    assert not offer.offer_of(uneven, notes.append)["use_gpu"]
    assert "lower scaling.num_workers to 2" in str(notes[-1])
    assert offer.offer_of(with_scaling(plan, num_workers=1, accelerator_type="L4"), notes.append)["use_gpu"]
    with pytest.raises(RefusedError, match="the kind H100 are wanted, and the cluster has L4") as caught:
        offer.offer_of(with_scaling(plan, num_workers=1, accelerator_type="H100"), notes.append)
    assert "scaling.accelerator_type" in caught.value.mend


@pytest.mark.usefixtures("_two_nodes")
def test_trials_share_gpus_as_workers_do(plan: Plan) -> None:
    from orchestrator.tuning.room import Room, room_for

    one = with_scaling(plan, num_workers=1)
    assert room_for(one, 8, None) == Room(1, 4, use_gpu=True)  # 6 threads have no place: the nodes have 2 and 4
    assert room_for(with_scaling(one, gpus_per_worker=0.25), 8, None) == Room(4, 1, use_gpu=True)
    assert room_for(with_scaling(plan, gpus_per_worker=0.5), 8, None) == Room(1, 2, use_gpu=True)
    assert room_for(with_scaling(one, device="cpu"), 2, None) == Room(2, 2, use_gpu=False)
    assert not room_for(plan, 8, None).use_gpu  # two workers and one GPU: on CPUs, as a job that is no search
    with pytest.raises(RefusedError, match="2 processes of 1 threads and a GPU each, and the cluster has 6 CPUs and 1"):
        room_for(with_scaling(plan, device="gpu"), 8, None)
    with pytest.raises(RefusedError, match="6 CPUs and 0 H100 GPUs") as caught:
        room_for(with_scaling(one, accelerator_type="H100"), 8, None)
    assert "device cpu" in caught.value.mend
    assert room_for(with_scaling(one, accelerator_type="L4"), 8, None) == Room(1, 4, use_gpu=True)


@pytest.mark.usefixtures("_two_nodes")
def test_workers_have_a_place_as_their_placement_has_it(plan: Plan) -> None:
    from orchestrator.distributed import offer

    notes: list[Event] = []
    cpu = with_scaling(plan, device="cpu")
    assert offer.offer_of(cpu, notes.append)["threads"] == 2  # one on each node, or both on the larger one
    assert offer.offer_of(with_scaling(cpu, placement="strict-pack"), notes.append)["threads"] == 2
    assert offer.offer_of(with_scaling(cpu, placement="strict-spread"), notes.append)["threads"] == 2
    for num, placement in ((5, "strict-pack"), (3, "strict-spread")):
        with pytest.raises(RefusedError, match=f"{num} workers of 1 threads have no place {placement}") as caught:
            offer.offer_of(with_scaling(cpu, num_workers=num, placement=placement), notes.append)
        assert f"use placement {placement.removeprefix('strict-')}" in caught.value.mend
    split = with_scaling(cpu, num_workers=2).model_copy(update={"threads_per_worker": 3})
    with pytest.raises(RefusedError, match="2 workers of 3 threads have no place: the nodes have 4, 2 CPUs"):
        offer.offer_of(split, notes.append)  # 6 of 6 CPUs, and yet


@pytest.mark.usefixtures("_two_nodes")
def test_waiting_is_shown_and_has_an_end(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from orchestrator.distributed import waiting
    from orchestrator.distributed.places import places_of

    notes: list[Event] = []
    taken = ray.util.placement_group([{"CPU": 2}, {"CPU": 4}])
    ray.get(taken.ready())
    wait = waiting.Wait(with_scaling(plan, wait_s=1e-9), 2, False, notes.append)
    wait.look(True, places_of(None))
    wait.look(True, places_of(None))  # what this job asked for is set aside: it starts, and waits for nobody
    ray.util.remove_placement_group(taken)
    while ray.available_resources().get("CPU") != 6:  # the nodes tell a moment later
        time.sleep(0.05)
    assert places_of(None) == []
    wait.look(False, [])
    wait.look(True, [])
    with pytest.raises(RefusedError, match="no place on the cluster for 1e-09 s") as caught:
        wait.look(True, [])
    assert "scaling.wait_s" in caught.value.mend
    monkeypatch.setattr(waiting, "_TOLD_EVERY_S", 0.0)
    wait = waiting.Wait(with_scaling(plan, num_workers=4), 2, False, notes.append)
    wait.look(True, [])
    assert notes == [Noted("still waiting for a place: 8 CPUs are wanted and 6 are free; 30 min are left")]


def test_workers_that_end_before_they_begin_are_told_of_and_given_up(plan: Plan) -> None:
    """Ray starts them for ever, each time in another place; how often that was, it says nowhere."""
    from orchestrator.distributed.waiting import Wait

    notes: list[Event] = []
    wait = Wait(plan, 2, False, notes.append)
    for place in ("a", "a", "b"):
        wait.look(True, [place])
    assert notes == [Noted("the workers ended before they had begun; attempt 2 of 5", is_warning=True)]
    wait.look(False, ["b"])  # some have begun: what was before counts no more
    for place in "cdefg":
        wait.look(True, [place])
    with pytest.raises(TrainingError, match="the workers ended 5 times before they had begun"):
        wait.look(True, ["h"])


@pytest.mark.usefixtures("_two_nodes")
def test_what_a_controller_had_set_aside_is_given_back_when_it_has_died() -> None:
    """With the workers in it. What others have is theirs, and Ray itself would keep all of it until the job ends."""
    import ray

    from orchestrator.distributed.places import give_back_places, places_of

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self) -> tuple[str, int]:
            self.place = ray.util.placement_group([{"CPU": 1}])
            ray.get(self.place.ready())
            return ray.get_runtime_context().get_actor_id(), os.getpid()

    dying, living = Controller.remote(), Controller.remote()
    (one, pid), (other, _) = ray.get([dying.start.remote(), living.start.remote()])
    assert (len(places_of(one)), len(places_of(other)), places_of(None)) == (1, 1, [])
    os.kill(pid, signal.SIGKILL)
    give_back_places(one)
    assert (len(places_of(one)), len(places_of(other))) == (0, 1)
    ray.kill(living)
    until = time.monotonic() + 30
    while places_of(other) and time.monotonic() < until:
        give_back_places()
    assert places_of(other) == []


def test_where_no_node_tells_its_kind_that_is_what_is_to_be_mended(plan: Plan) -> None:
    from orchestrator.distributed import offer

    wanted = with_scaling(plan, num_workers=1, device="gpu", accelerator_type="L4")
    with pytest.raises(RefusedError, match="no kind that it tells") as caught:
        offer._use_gpu(wanted, [{"CPU": 7, "GPU": 1}], print)
    assert f'"accelerator_type:L4": 1 among their resources (in {offer.NODE_TYPES} on the head' in caught.value.mend


def test_a_node_that_is_taken_away_is_told() -> None:
    from orchestrator.distributed.events import EventQueue

    queue = EventQueue()
    assert queue.is_waiting()
    for rank in (0, 1):
        queue.began(rank, f"process {rank} on 10.0.0.{rank}")
    assert not queue.is_waiting()
    queue.taken_away([1])
    assert queue.is_waiting()
    text = (
        "worker 1 (process 1 on 10.0.0.1): its node is taken away; a checkpoint is written, and it goes on without it"
    )
    assert queue.take(stop=False) == [Noted(text, is_warning=True)]


def test_a_queue_that_was_started_again_learns_that_workers_run() -> None:
    """Each asks it once a second whether to end; else a stop would end them amid their step."""
    from orchestrator.distributed.events import EventQueue

    queue = EventQueue()
    queue.is_ending("10.0.0.1:7", trains=False)  # an extractor
    assert queue.is_waiting()
    queue.is_ending("10.0.0.1:8", trains=True)
    assert not queue.is_waiting()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.213.0.11]:24764. "
         "This usually means the remote peer crashed or exited; GLHF!",
         "it lost the worker on 10.213.0.11, which is gone or out of reach"),
        ("NCCL error: ncclRemoteError: remote process exited or there was a network error",
         "it lost another worker, which is gone or out of reach"),
        ("a size does not fit", "RuntimeError: a size does not fit"),
    ],
)  # fmt: skip
def test_a_worker_that_lives_tells_which_one_is_gone(said: str, told: str) -> None:
    from orchestrator.distributed.failures import failures_of

    assert failures_of({0: RuntimeError(said)}) == {0: told}


@pytest.mark.usefixtures("_two_nodes")
@pytest.mark.parametrize("told", ["by the environment", "by what ray up leaves"])
def test_what_an_autoscaler_could_give_is_waited_for(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str
) -> None:
    from orchestrator.distributed import offer

    notes: list[Event] = []
    with pytest.raises(RefusedError, match="2 processes want a GPU each, and the cluster has 1"):
        offer.offer_of(with_scaling(plan, device="gpu"), notes.append)
    kind = {"CPU": 16, "GPU": 1}
    if told == "by the environment":
        monkeypatch.setenv(offer.NODE_TYPES, json.dumps([{"resources": kind, "max": 2}]))
    else:
        monkeypatch.setenv("HOME", str(tmp_path))
        types = {"head": {"resources": {"CPU": 64}, "max_workers": 0}, "gpu": {"resources": kind, "max_workers": 2}}
        file = {"head_node_type": "head", "available_node_types": types}
        (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(file))
    given = offer.offer_of(with_scaling(plan, device="gpu"), notes.append)
    assert (given["use_gpu"], given["threads"]) == (True, 16)  # a machine's cores, which is not there yet
    assert notes == [
        Noted("the job waits for its place on the cluster: 32 CPUs are wanted and 6 are free, 2 GPUs are wanted and "
              "1 are free")
    ]  # fmt: skip


@pytest.mark.usefixtures("_two_nodes")
def test_what_an_autoscaler_has_added_it_does_not_add_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.distributed import offer

    there = {"CPU": 4, "GPU": 1, "accelerator_type:L4": 1}
    for kind, most, possible in ((there, 3, 3), ({"CPU": 4, "GPU": 1}, 3, 3), ({**there, "CPU": 8}, 3, 4),
                                 ({"CPU": 2}, 3, 4)):  # fmt: skip
        monkeypatch.setenv(offer.NODE_TYPES, json.dumps([{"resources": kind, "max": most}]))
        assert len(offer.nodes_possible()) == 1 + possible, kind  # and the head, which is of no type


@pytest.mark.usefixtures("_two_nodes")
@pytest.mark.parametrize("nonsense", ["{", "7", '[{"max": 2}]', '[{"resources": {"CPU": "x"}, "max": 1}]', "null"])
def test_nonsense_about_node_types_is_refused(monkeypatch: pytest.MonkeyPatch, nonsense: str) -> None:
    from orchestrator.distributed import offer

    monkeypatch.setenv(offer.NODE_TYPES, nonsense)
    with pytest.raises(RefusedError, match=f"{offer.NODE_TYPES} on the head does not say") as caught:
        offer.nodes_possible()
    assert "where the head is started" in caught.value.mend


@pytest.mark.usefixtures("_two_nodes")
def test_where_kuberay_adds_nodes_that_nobody_describes_a_job_waits(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator.distributed import offer
    from orchestrator.tuning.room import Room, room_for

    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0")
    notes: list[Event] = []
    many = with_scaling(plan, num_workers=50, device="gpu")
    assert offer.offer_of(many, notes.append)["use_gpu"]
    assert "50 GPUs are wanted and 1 are free" in str(notes[-1])
    assert room_for(many, 8, None) == Room(1, 1, use_gpu=True)


@pytest.mark.usefixtures("_two_nodes")
@pytest.mark.parametrize("num_failures", [2, 3])
def test_workers_that_do_not_find_one_another_are_started_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, num_failures: int
) -> None:
    """With GLOO_SOCKET_IFNAME=none0 it is so, and takes minutes: here the trainer fails as Ray's fails then."""
    import ray
    from ray.train import ControllerError

    from orchestrator.distributed import joining, trainer

    failed = []

    class Trainer:
        def fit(self) -> None:
            if len(failed) < num_failures:
                failed.append(1)
                raise ControllerError(RuntimeError("Traceback\n  ...\nRuntimeError: Unable to find address for: none0"))

    monkeypatch.setattr(trainer, "_trainer", lambda *_: Trainer())
    queue = joining.event_queue()
    error = trainer.fit(plan, None, print, {"queue": queue})  # type: ignore[arg-type]
    why = "the workers could not be started: RuntimeError: Unable to find address for: none0"
    told = [Noted(f"{why}; attempt {number} of 3", is_warning=True) for number in (2, 3)]
    assert ray.get(queue.take.remote(False)) == told
    ray.kill(queue)
    if num_failures == 2:
        assert error is None
    else:
        assert isinstance(error, TrainingError)
        assert error.message == f"{why}, in 3 attempts"
        assert "GLOO_SOCKET_IFNAME" in error.mend


def test_a_trainer_that_ends_with_its_driver_asks_ray_nothing(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray ends a process a thread of which asks it something while it is shut down: with 1, in the place of 130."""
    import ray
    from ray.train import ControllerError

    from orchestrator.distributed import trainer

    errors = [ray.exceptions.ActorDiedError(), ControllerError(RuntimeError("gone"))]

    class Trainer:
        def fit(self) -> None:
            raise errors.pop()

    monkeypatch.setattr(trainer, "_trainer", lambda *_: Trainer())
    queue = object()  # who asks it fails
    while errors:
        assert trainer.fit(plan, None, print, {"queue": queue}, lambda: True) is None  # type: ignore[arg-type]


@pytest.mark.usefixtures("_two_nodes")
def test_who_waits_for_a_controller_comes_back_before_ray_is_shut_down() -> None:
    """It was still waiting then, and the process ended with 1 where the answer came just at that moment."""
    import ray

    from orchestrator.distributed import joining, trainer

    class Controller:
        def run(self) -> None:
            time.sleep(1000)

    came: list[BaseException] = []

    def wait() -> None:
        try:
            ray.get(controller.run.remote())
        except ray.exceptions.ActorDiedError as error:
            came.append(error)

    controller, queue = ray.remote(num_cpus=0)(Controller).remote(), joining.event_queue()
    ray.get(queue.starting.remote(controller._actor_id.hex()))
    thread = threading.Thread(target=wait)
    thread.start()
    trainer.end_controller(queue, thread, 30)
    assert not thread.is_alive()
    assert came
    ray.kill(queue)


@pytest.mark.usefixtures("_two_nodes")
def test_the_queue_of_events_is_on_the_drivers_node() -> None:
    import ray

    from orchestrator.distributed import joining

    here = ray.get_runtime_context().get_node_id()
    for _ in range(4):  # left to Ray, they would be spread
        queue = joining.event_queue()
        assert ray.get(queue.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())) == here
        ray.kill(queue)


@pytest.mark.cluster
def test_workers_that_do_not_answer_are_ended_before_the_run_is_somebody_elses(
    tiny_resnet: Path, flat_digits: Path
) -> None:
    """A worker hangs in a sample; the driver is asked to stop. In a process of its own, since Ray is shut down."""
    script = textwrap.dedent("""
        import dataclasses, os, sys, time
        from pathlib import Path
        import orchestrator
        from orchestrator.distributed import cluster
        from orchestrator.job import DirectoryStorage, hold
        from orchestrator.modality import registry

        cluster._STOP_GRACE_S = 3.0
        hanging = Path("hanging").absolute()
        image = registry.get("image")

        def decode(sample):
            if os.getpid() != driver:
                hanging.write_text(str(os.getpid()))
                time.sleep(1000)
            return image.decode(sample)

        driver = os.getpid()
        orchestrator.register(dataclasses.replace(image, name="slow", decode=decode))
        try:
            orchestrator.finetune(
                modality="slow", backbone=sys.argv[1], data=sys.argv[2], method="full", name="run",
                scaling={"address": "local", "threads_per_worker": 1}, report=lambda _: None, stop=hanging.exists,
            )
        except orchestrator.OrchestratorError as error:
            print(error.exit_code, error.message)
        with hold(DirectoryStorage(Path("runs").absolute()), "run"):
            for _ in range(100):
                if not Path(f"/proc/{hanging.read_text()}").exists():
                    print("ended")
                    break
                time.sleep(0.1)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_resnet), str(flat_digits)],
        capture_output=True, text=True, check=False, timeout=240, env={**os.environ},
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if "(raylet)" not in line]
    assert said == ["130 stopped; the workers did not answer", "ended"], done.stderr[-3000:]
