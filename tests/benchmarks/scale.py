"""Full fine-tuning on 1, 2 and 4 workers of this machine, with all its cores in sum: make bench NAME=scale

1,000 digits, EfficientNet-Lite0, 96 px, a batch of 32 over all workers, AdamW. Each number of workers against plain
DistributedDataParallel over gloo with as many processes and threads, in turn; samples a second of the epochs after the
first. Goal: .95 of its speed at each number. What went over the loopback network is published with it, and beside it
the same plain loop in the workers of Ray's TorchTrainer, told to it once an epoch: what Ray itself costs.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import THREADS, in_turn, options, paired, process, report, silent
from tests.benchmarks.peers import BATCH_SIZE, DIGITS, image_collate, make_digits

GOAL, REPEATS = 0.95, 3
SIZE, NUM_TRAIN, EPOCHS = 96, 1000, 4
WORKERS = (1, 2, 4)


def threads_of(num_workers: int) -> int:
    """All cores in sum; one each where there are more workers than cores."""
    return max(1, THREADS // num_workers)


def bytes_on_loopback() -> int:
    """That were ever sent over it."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    return 0


def ours(storage: Path, data: Path, num_workers: int) -> dict[str, float]:
    """Samples a second of each epoch but the first."""
    import orchestrator

    if (
        num_workers > 1
    ):  # more workers than cores are refused on this machine, and not by a cluster that says it has them
        import ray

        ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        scaling = {"address": ray.get_runtime_context().gcs_address}
    else:
        scaling = {}
    run = orchestrator.finetune(
        backbone=str(DIGITS / "backbone"), data={"path": str(data), "validation_fraction": 0.0}, method="full",
        training={"epochs": EPOCHS, "batch_size": BATCH_SIZE, "clip_norm": None, "checkpoint_every_s": 1e9,
                  "batch_norm": "train"},
        settings={"size": SIZE, "augment": "none"}, storage=str(storage), report=silent,
        scaling={"num_workers": num_workers, "threads_per_worker": threads_of(num_workers),
                 **scaling},
    )  # fmt: skip
    return {"samples_per_s": statistics.median(line["samples_per_s"] for line in run.metrics[1:])}


def ddp(_storage: Path, data: Path, num_workers: int) -> dict[str, float]:
    """The same of DistributedDataParallel: each process has its share of every batch."""
    import torch.multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        torch.multiprocessing.spawn(_ddp_process, (num_workers, port, str(data), str(answer)), nprocs=num_workers)
        found: dict[str, float] = json.loads(answer.read_text())
    return found


def _ddp_process(rank: int, num_workers: int, port: int, data: str, answer: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers, timeout=timedelta(minutes=5)
    )
    speeds = list(_epochs(rank, num_workers, data))
    if rank == 0:
        Path(answer).write_text(json.dumps({"samples_per_s": statistics.median(speeds[1:])}))
    dist.barrier()
    dist.destroy_process_group()


def _epochs(rank: int, num_workers: int, data: str) -> Iterator[float]:
    """The plain loop in one of these processes: samples a second of each epoch."""
    import torch

    from tests.benchmarks import plain
    from tests.benchmarks.harness import same_settings

    same_settings()
    torch.set_num_threads(threads_of(num_workers))
    model: Any = plain.classifier()
    if num_workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer, collate, files = (
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        image_collate(SIZE),
        plain.digits(data=Path(data)),
    )
    for epoch in range(EPOCHS):
        started = time.monotonic()
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(epoch)).tolist()
        shares = [batch[rank::num_workers] for batch in plain.pieces(order, BATCH_SIZE)]
        for batch in plain.ahead(lambda share: collate([files[place] for place in share]), shares):
            plain.train_step(model, optimizer, batch)
        yield len(files) / (time.monotonic() - started)


def on_ray(storage: Path, data: Path, num_workers: int) -> dict[str, float]:
    """The same of the plain loop where Ray Train starts the processes."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    answer = storage.absolute() / "answer.json"

    def work() -> None:
        rank, speeds = ray.train.get_context().get_world_rank(), []
        for speed in _epochs(rank, num_workers, str(data)):
            speeds.append(speed)
            ray.train.report({"samples_per_s": speed})
        if rank == 0:
            answer.write_text(json.dumps({"samples_per_s": statistics.median(speeds[1:])}))

    ray.init(
        num_cpus=num_workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd()), "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]}},
    )  # fmt: skip
    storage.mkdir()
    TorchTrainer(
        work,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
        run_config=ray.train.RunConfig(storage_path=str(storage.absolute())),
    ).fit()
    found: dict[str, float] = json.loads(answer.read_text())
    return found


def make_some(out: Path) -> None:
    """So many of the digits, in the same folders; hardly any to test on."""
    for split, num in (("train", NUM_TRAIN), ("test", 20)):
        for folder in sorted((DIGITS / "data" / split).iterdir()):
            (out / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[: num // 10]:
                shutil.copy(file, out / split / folder.name)


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--workers", type=int, action="append", choices=WORKERS)
    given = parser.parse_args()
    if given.side:
        who, _, num = given.side.partition("-")
        storage, before = Path(given.storage), bytes_on_loopback()
        data = storage.parent / "data"
        found = {"ours": ours, "ddp": ddp, "ray": on_ray}[who](storage, data, int(num))
        print(json.dumps({**found, "loopback_mb": round((bytes_on_loopback() - before) / 1e6, 1)}))
        return
    make_digits()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # four workers on two cores wait for each other otherwise
    with tempfile.TemporaryDirectory() as folder:
        make_some(Path(folder) / "data")
        rows, more = [], {}
        for num_workers in given.workers or WORKERS:
            sides = {
                f"{who}-{num_workers}": lambda repeat, side=f"{who}-{num_workers}": (
                    process("scale", "--side", side, "--storage", f"{folder}/{side}-{repeat}").answer
                )
                for who in (("ours", "ddp", "ray") if num_workers > 1 else ("ours", "ddp"))
            }
            _, found = in_turn(sides, given.repeats)
            speeds = {side: [one["samples_per_s"] for one in answers] for side, answers in found.items()}
            theirs = speeds[f"ddp-{num_workers}"]
            speed = paired(speeds[f"ours-{num_workers}"], theirs)
            rows.append((f"samples a second over DDP's, {num_workers} workers", speed, GOAL, True))
            more |= found
            if num_workers > 1:
                more[f"ray_over_ddp-{num_workers}"] = paired(speeds[f"ray-{num_workers}"], theirs)
    report("scale", rows, **more)


if __name__ == "__main__":
    sys.exit(main())
