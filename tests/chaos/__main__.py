"""make chaos [ROUNDS=5] [ROWS=worker,driver]: each row at so many random moments, some a run; one JSON line at the end.

`{"tried": N, "survived": N, "moments": N, "rows": {row: [{"faults": [...], "moments": N, "starts": N, "sha256": ...,
"survived": true}, ...]}}`, one of these a run. A run survives if it ends, after the same command again where its driver
was hurt, with the weights of one that was left alone, bit for bit, no trace in what it said, and no process left; an
elastic group has taken each sample once an epoch, too. Exit code 1 where one did not, or where the time was over before
all moments; a row that wants root is skipped, and says so.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.fs
from moto.server import ThreadedMotoServer

from cluster.local import LocalCluster
from cluster.machine import ClusterError
from orchestrator.job import open_storage
from tests.chaos.rows import ROWS, SKIPPED, Row
from tests.chaos.work import STEPS_AN_EPOCH, NotSurvivedError, Work, environment
from tests.hub_server import Hub, Repository, serve
from tests.s3_proxy import Proxy, serve as serve_proxy
from tests.tiny import make_digits, make_resnet

EPOCHS = 15
JOB = (
    "--method", "full", "--batch-size", "16", "--set", "training.checkpoint_every_steps=5",
    "--set", "scaling.threads_per_worker=1",
)  # fmt: skip
NO_TIME = "no time was left"
MOST_A_RUN = 5
"""Moments."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="random moments a row (5)")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of: " + ", ".join(ROWS))
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments; default: the time")
    parser.add_argument("--minutes", type=float, default=45, help="no run begins after so many (45)")
    asked = parser.parse_args()
    names = [name for name in asked.rows.split(",") if name]
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    print(f"seed {asked.seed}", file=sys.stderr)
    until = time.monotonic() + 60 * asked.minutes
    with (
        tempfile.TemporaryDirectory(prefix="orc-", ignore_cleanup_errors=True) as folder,
        serve() as hub,
        ExitStack() as resources,
    ):
        found = Rounds(Path(folder), hub, asked.seed, resources).run(names, asked.rounds, until)
    tried = [one for rounds in found.values() for one in rounds if "skipped" not in one]
    survived = sum(one["survived"] for one in tried)
    moments = sum(one["moments"] for one in tried)
    print(json.dumps({"tried": len(tried), "survived": survived, "moments": moments, "rows": found}))
    ran_out = any(one.get("skipped", "").startswith(NO_TIME) for rounds in found.values() for one in rounds)
    return 0 if tried and survived == len(tried) and not ran_out else 1


class Rounds:
    """The rows, a run of each after the other, over the same backbone and digits."""

    def __init__(self, folder: Path, hub: Hub, seed: int, resources: ExitStack, epochs: int = EPOCHS) -> None:
        self.folder, self.hub, self.seed, self.resources, self.epochs = folder, hub, seed, resources, epochs
        self._proxy: Proxy | None = None
        self._alone = threading.Lock()
        self.backbone, self.digits = make_resnet(folder / "backbone"), make_digits(folder / "digits")
        self.references: dict[tuple[str, bool], str] = {}

    def run(self, names: list[str], rounds: int, until: float) -> dict[str, list[dict[str, Any]]]:
        """Row -> its runs, as many as it takes to so many moments, or as there was time for."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        beside = [name for name in names if ROWS[name].in_store]
        if beside:
            self.proxy()
        with ThreadPoolExecutor(1) as pool:  # they wait for leases to run out most of the time: so beside all others
            waiting = pool.submit(self._rows, beside, rounds, until, found)
            self._rows([name for name in names if name not in beside], rounds, until, found)
            waiting.result()
        return found

    def _rows(self, names: list[str], rounds: int, until: float, found: dict[str, list[dict[str, Any]]]) -> None:
        left = dict.fromkeys(names, rounds)
        while any(left.values()):
            for name in [one for one in names if left[one]]:
                if time.monotonic() > until:
                    found[name].append({"skipped": f"{NO_TIME} for {left[name]} moments"})
                    left[name] = 0
                    continue
                started = time.monotonic()
                one = self.round(name, ROWS[name], len(found[name]), min(left[name], MOST_A_RUN))
                found[name].append(one | {"seconds": round(time.monotonic() - started, 1)})
                why = one.get("skipped") or one.get("why") or ", ".join(fault["kind"] for fault in one["faults"])
                verdict = "skipped" if "skipped" in one else "survived" if one["survived"] else "NOT SURVIVED"
                left[name] = 0 if "skipped" in one else max(0, left[name] - max(1, one["moments"]))
                moments = f"{rounds - left[name]}/{rounds}"
                print(f"{name} {moments}: {verdict}: {why}", file=sys.stderr, flush=True)

    def round(self, name: str, row: Row, number: int, wanted: int) -> dict[str, Any]:
        """One job, hurt at so many moments, as far as it lasts, and brought to its end."""
        if why := row.needs():
            return {"skipped": why}
        expected = self.reference(row)
        folder = self.folder / f"{name}-{number}"
        work = self.work(folder, row, random.Random(f"{self.seed} {name} {number}"))
        work.wanted, work.is_first = wanted, number == 0
        one: dict[str, Any] = {"faults": work.faults, "survived": False}
        try:
            if row.on_nodes:
                work.cluster = LocalCluster(num_nodes=row.on_nodes, cpus=1).up()
            row.hurt(work)
            one["sha256"] = work.finish()
            work.leaves_nothing()
            if not work.faults:
                raise NotSurvivedError("nothing was done to it")
            if one["sha256"] != expected:
                raise NotSurvivedError(f"other weights than {expected}")
            row.check(work)
            one["survived"] = True
        except NotSurvivedError as error:
            if str(error).startswith(SKIPPED):
                return {"skipped": str(error).removeprefix(SKIPPED)}
            one["why"] = str(error)
        except (subprocess.TimeoutExpired, ClusterError, OSError) as error:  # the other rows go on
            one["why"] = f"{type(error).__name__}: {error}; {work.said()[-800:] if work.num_starts else ''}"
        finally:
            if row.on_hub:
                self.hub.faults.clear()
            if row.in_store and self._proxy is not None:
                self._proxy.faults.clear()
                self._proxy.away_until = 0.0
            clear(work)
        return one | {"moments": work.moments, "starts": work.num_starts}

    def work(self, folder: Path, row: Row, chance: random.Random) -> Work:
        folder.mkdir(parents=True)
        backbone = "org/tiny" if row.on_hub else str(self.backbone)
        if row.on_hub:
            files = {file.name: file.read_bytes() for file in self.backbone.iterdir()}
            self.hub.repositories["org/tiny"] = Repository(files)
        place, proxy = str(folder / "runs"), None
        more = {"HF_ENDPOINT": self.hub.url, "XDG_CACHE_HOME": str(folder / "cache")}
        if row.in_store:
            place, proxy = f"s3://bucket/{folder.name}", self.proxy()
            more |= {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        job = (
            "--backbone", backbone, "--data", str(self.digits), "--storage", place, "--epochs", str(self.epochs),
            *JOB, *row.arguments,
        )  # fmt: skip
        return Work(
            folder, job, environment(folder, **more), chance, self.hub, open_storage(place), proxy,
            num_steps=self.epochs * STEPS_AN_EPOCH,
        )  # fmt: skip

    def proxy(self) -> Proxy:
        """In front of an object store, which begins with the first row that wants it."""
        if self._proxy is None:
            logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            self.resources.callback(server.stop)
            url = "http://{}:{}".format(*server.get_host_and_port())
            os.environ |= {
                "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": url, "XDG_CACHE_HOME": str(self.folder / "cache"),
            }  # fmt: skip
            pyarrow.fs.S3FileSystem(endpoint_override=url, allow_bucket_creation=True).create_dir("bucket")
            self._proxy = self.resources.enter_context(serve_proxy(url))
        return self._proxy

    def reference(self, row: Row) -> str:
        """The hash of the weights of the same job, left alone."""
        key = (row.reference, row.on_hub)
        with self._alone:
            if key not in self.references:
                work = self.work(self.folder / f"left-alone-{row.reference}-{row.on_hub}", row, random.Random(0))
                self.references[key] = work.finish(attempts=1)
        return self.references[key]


def clear(work: Work) -> None:
    """End what is left of a job, and of its machines, and remove it."""
    if work.process is not None and work.process.poll() is None:
        work.process.kill()
        work.process.wait()
    if work.cluster is not None:
        work.cluster.down()
    if work.runs.is_mount():
        subprocess.run(["umount", "-l", work.runs], check=False)
    shutil.rmtree(work.folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
