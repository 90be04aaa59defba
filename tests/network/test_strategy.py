"""Gradients, initial weights and exports on two real processes over gloo, held against one process."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from orchestrator.errors import TrainingError
from orchestrator.network import GradientReduction, Network, Replicated, Worker
from orchestrator.network.batchnorm import MicrobatchStatistics

NUM_STEPS, NUM_MICROBATCHES, NUM_IN_MICROBATCH = 3, 5, 4
SMALL = 250  # bytes in a bucket: several of them in this network


class Branches(nn.Module):
    """A chain, a layer that some microbatches leave out, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.sometimes = nn.Linear(16, 16)
        self.never = nn.Linear(3, 3)
        self.last = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.randn(16, dtype=torch.float64))  # another dtype: a bucket of its own

    def forward(self, x: Tensor, use_all: bool) -> Tensor:
        x = self.norm(self.first(x).relu().mean(dim=1).flatten(1))
        if use_all:
            x = self.sometimes(x)
        return self.last(x * self.scale.float())  # type: ignore[no-any-return]


def made(seed: int = 0) -> Branches:
    torch.manual_seed(seed)
    return Branches().to(memory_format=torch.channels_last)


def network(module: nn.Module, new: tuple[str, ...] = ()) -> Network:
    return Network(module, ("last",), new, (), lambda *_: None)


def loss_of(module: Branches, step: int, microbatch: int) -> Tensor:
    """A sum over samples; odd microbatches leave `sometimes` out."""
    generator = torch.Generator().manual_seed(100 * step + microbatch)
    x = torch.randn(NUM_IN_MICROBATCH, 1, 6, 6, generator=generator).to(module.scale.device)
    return module(x, use_all=microbatch % 2 == 0).square().sum()  # type: ignore[no-any-return]


def train(
    rank: int, num_workers: int, bucket_bytes: int = SMALL, device: str = "cpu"
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """(the gradients of each step, how many exchanges each overlapped backward pass began)."""
    module = made().to(device)
    named = dict(module.named_parameters())
    worker = Worker(rank, rank, num_workers, torch.device(device), 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    gradients, begun = [], []
    with GradientReduction(list(named.values()), num_workers, bucket_bytes) as reduction:
        for step in range(NUM_STEPS):
            mine = [number for number in range(NUM_MICROBATCHES) if number % num_workers == rank]
            if step == 1 and rank == 1:
                mine = []  # all that it had were unreadable
            elif step == 1 and num_workers == 1:
                mine = [number for number in mine if number % 2 == 0]
            for number in mine:
                loss = loss_of(module, step, number)
                with reduction.overlapped() if number == mine[-1] else contextlib.nullcontext():
                    loss.backward()  # type: ignore[no-untyped-call]
            begun.append(len(reduction._begun))
            reduction.begin()
            # Another exchange comes between, as the loop has it.
            total = worker.all_reduce_sum(torch.tensor(float(len(mine)), device=device))
            reduction.finish(1.0 / total.item() if step else 1.0 / total)
            gradients.append({name: one.grad.cpu().clone() for name, one in named.items() if one.grad is not None})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert not module.first.weight._post_accumulate_grad_hooks
    return gradients, begun


def of_one_rank(rank: int, folder: str, backend: str) -> None:
    """Everything that two processes are needed for, in one start of them; what they saw goes into files."""
    torch.set_num_threads(1)
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=2)
    worker = Worker(rank, rank, 2, torch.device(device), 1)
    seen: dict[str, Any] = {}
    seen["gradients"], seen["begun"] = train(rank, 2, device=device)
    seen["gradients in one bucket"], _ = train(rank, 2, bucket_bytes=2**20, device=device)

    norm = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).to(device)
    statistics = MicrobatchStatistics(norm, worker, num_microbatches=1)
    if rank == 0:  # the one microbatch of a run that began on one worker
        with statistics.of(0):
            norm(torch.arange(12.0, device=device).reshape(4, 3))
    statistics.average()
    seen["statistics"] = {name: value.cpu().clone() for name, value in norm.state_dict().items()}

    module = made(seed=rank)  # what is random differs
    module.register_buffer("counter", torch.tensor(rank))
    module.to(device)
    names = ("last.weight", "last.bias", "first.weight", "scale", "counter")
    before = {name: value.cpu().clone() for name, value in module.state_dict().items()}
    replicated = Replicated(network(module, names), worker)
    replicated.broadcast_new()
    seen["before"], seen["after"] = before, {name: value.cpu() for name, value in module.state_dict().items()}
    gathered = replicated.full_state()
    seen["gathered"] = gathered is not None and gathered.keys() == before.keys()
    seen["state is itself"] = (
        replicated.state(["last.weight"])["last.weight"].data_ptr() == module.last.weight.data_ptr()
    )
    try:
        Replicated(network(made(), names[: 2 + rank]), worker).broadcast_new()
    except TrainingError as error:
        seen["refused"] = str(error)
    torch.save(seen, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return on_two_ranks(tmp_path_factory.mktemp("ranks"), "gloo")


def on_two_ranks(folder: Path, backend: str) -> list[dict[str, Any]]:
    """What each of two processes of this backend saw."""
    torch.multiprocessing.spawn(of_one_rank, (str(folder), backend), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_worker_without_a_microbatch_has_the_statistics_of_the_others(two: list[dict[str, Any]]) -> None:
    alone = torch.nn.BatchNorm1d(3)
    alone(torch.arange(12.0).reshape(4, 3))
    for seen in two:
        assert seen["statistics"].keys() == {f"0.{name}" for name in alone.state_dict()}
        for name, value in alone.state_dict().items():
            assert torch.allclose(seen["statistics"][f"0.{name}"], value), name


@pytest.mark.parametrize("name", ["gradients", "gradients in one bucket"])
def test_two_workers_learn_from_the_gradients_of_one(two: list[dict[str, Any]], name: str) -> None:
    assert_as_one(two, name, tolerance=1e-6)


def assert_as_one(two: list[dict[str, Any]], name: str, tolerance: float) -> None:
    """The gradients of both ranks are equal, and those of one process within the tolerance."""
    alone, _ = train(0, 1)
    for seen in two:
        assert len(seen[name]) == len(alone) == NUM_STEPS
        for ours, theirs in zip(seen[name], alone, strict=True):
            assert ours.keys() == theirs.keys()
            assert "never.weight" in ours
            for key, gradient in theirs.items():
                assert torch.allclose(ours[key], gradient, rtol=tolerance, atol=tolerance), key
    for key, gradient in two[0][name][-1].items():
        assert torch.equal(gradient, two[1][name][-1][key])


def test_exchanges_begin_during_the_backward_pass_in_one_order(two: list[dict[str, Any]]) -> None:
    num_buckets = len(GradientReduction(list(made().parameters()), 2, SMALL)._buckets)
    assert num_buckets > 3
    # In the first step everything waits for `never`, which is behind the last layer; then that goes last. The last
    # microbatch of rank 0 has a gradient for all else, that of rank 1 none for `sometimes`: what is behind that waits.
    # In the second step rank 1 has no microbatch at all.
    first, second = two[0]["begun"], two[1]["begun"]
    assert first[0] < first[2]
    assert num_buckets - 1 <= first[2]
    assert second[0] == second[1] == 0
    assert 0 < second[2] < first[2]


def test_what_is_new_is_rank_0s_on_all(two: list[dict[str, Any]]) -> None:
    new = {"last.weight", "last.bias", "first.weight", "scale", "counter"}
    for name, value in two[1]["after"].items():
        expected = two[0 if name in new else 1]["before"][name]
        assert torch.equal(value, expected), name
    assert not torch.equal(two[0]["before"]["last.weight"], two[1]["before"]["last.weight"])
    assert all(torch.equal(value, two[0]["before"][name]) for name, value in two[0]["after"].items())


def test_a_worker_with_another_network_is_refused(two: list[dict[str, Any]]) -> None:
    for seen in two:
        assert "worker 1 has built another network" in seen["refused"]


def test_rank_0_gathers(two: list[dict[str, Any]]) -> None:
    assert [seen["gathered"] for seen in two] == [True, False]
    assert all(seen["state is itself"] for seen in two)


def test_one_worker_pays_nothing() -> None:
    module = made()
    worker = Worker(0, 0, 1, torch.device("cpu"), 1)
    replicated = Replicated(network(module, ("last.weight",)), worker)
    replicated.broadcast_new()
    gathered = replicated.full_state()
    assert gathered is not None
    assert gathered["last.weight"].data_ptr() == module.last.weight.data_ptr()
    with replicated.reduction(list(module.parameters())) as reduction:
        assert not reduction._buckets
        assert not module.last.weight._post_accumulate_grad_hooks
        with reduction.overlapped():
            loss_of(module, 0, 1).backward()  # type: ignore[no-untyped-call]
        assert module.last.weight.grad is not None
        before, place = module.last.weight.grad.clone(), module.last.weight.grad.data_ptr()
        reduction.begin()
        reduction.finish(0.5)
        assert module.last.weight.grad.data_ptr() == place
        assert torch.equal(module.last.weight.grad, before * 0.5)
        assert module.never.weight.grad is not None  # zeros, as where there are several
