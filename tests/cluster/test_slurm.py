"""The script for Slurm, on a Slurm cluster of two machines: Debian's, each in namespaces of its own."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import LocalCluster, Node, namespaces_allowed
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "cluster" / "slurm.sh"
SCRIPTS = sorted((REPOSITORY / "cluster").rglob("*.sh"))
CONFIG = """\
ClusterName=test
SlurmctldHost=node0
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmUser=root
SlurmdUser=root
ReturnToService=2
JobRequeue=1
SchedulerParameters=batch_sched_delay=0,sched_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
NodeName=node[0-1] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda one: one.name)
def test_shellcheck_finds_nothing(script: Path, tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    typo = tmp_path / script.name
    typo.write_text(script.read_text().replace("\nuntil ", "\nuntl ", 1))
    assert subprocess.run(["shellcheck", typo], capture_output=True, check=False).returncode == 1


class SlurmMachines(LocalCluster):
    """Machines that run Slurm and no Ray: that is for the script to start."""

    ready_word = "slurmd started"

    def _command_of(self, node: Node) -> list[str]:
        control = "slurmctld; " if node.name == "node0" else ""
        return ["sh", "-c", f"{control}exec slurmd -D -N {node.name}"]

    def _wait_for_dashboard(self) -> None:
        """There is none."""


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[SlurmMachines]:
    for program in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            pytest.skip(f"{program} is not installed (Debian: slurmctld, slurmd, slurm-client)")
    if not namespaces_allowed():
        pytest.skip("two machines of Slurm want namespaces, and so root")
    folder = tmp_path / "slurm"
    for name in ("state", "home"):
        (folder / name).mkdir(parents=True)
    # Short, for sockets: their paths have 108 bytes at most.
    scratch, spool = Path(f"/tmp/s{tmp_path.stat().st_ino:x}"), Path(f"/tmp/d{tmp_path.stat().st_ino:x}")
    scratch.mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, spool=spool))
    for node in ("node0", "node1"):
        (spool / node).mkdir(parents=True)
    env = {"SLURM_CONF": str(folder / "slurm.conf"), "HOME": str(folder / "home"), "TMPDIR": str(scratch)}
    try:
        with SlurmMachines(env=env, private=[str(scratch)]) as started:
            yield started
    finally:
        shutil.rmtree(spool)
        scratch.rmdir()


def wait_for(machines: SlurmMachines, log: Path, words: str) -> str:
    """What the job has written, once it has written that."""
    while words not in (text := log.read_text() if log.exists() else ""):
        queue = machines.run("node0", "squeue", "--noheader").stdout
        assert queue.strip(), f"the job has ended:\n{text}"
        assert "held" not in queue, f"Slurm cannot start it: {queue}"
        time.sleep(0.5)
    return text


def wait_until_empty(machines: SlurmMachines) -> None:
    """No job runs, and none waits."""
    while machines.run("node0", "squeue", "--noheader").stdout.strip():
        time.sleep(0.5)


def submitted(job: Path) -> tuple[Path, list[str]]:
    """The log of a job, and the words that give it to Slurm."""
    log = job.with_suffix(".log")
    return log, ["sbatch", "--cpus-per-task=2", "--time=9", "--output", str(log), str(SCRIPT), str(job)]


def write_job(folder: Path, backbone: Path, data: Path, epochs: int) -> Path:
    job = folder / "job.yaml"
    job.write_text(
        f"backbone: {backbone}\ndata: {data}\nmethod: full\nname: run\nstorage: {folder / 'runs'}\n"
        f"training: {{epochs: {epochs}, batch_size: 16}}\nscaling: {{num_workers: 2, threads_per_worker: 2}}\n"
    )
    return job


def nothing_is_left(machines: SlurmMachines, tmp_path: Path) -> None:
    """Of Ray, of its files and of the token."""
    assert not list((tmp_path / "slurm/home").glob(".ray-token-*"))
    for node in ("node0", "node1"):
        left = [line for line in machines.processes(node).values() if "raylet" in line or "gcs_server" in line]
        assert left == []
        assert machines.run(node, "sh", "-c", 'find "$TMPDIR" -mindepth 1').stdout == ""


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_a_job_is_cut_off_goes_on_and_leaves_nothing(
    machines: SlurmMachines, tiny_resnet: Path, digits: Path, tmp_path: Path
) -> None:
    """On two machines, one worker on each; the signal is that of the end of its time."""
    job = write_job(tmp_path, tiny_resnet, digits, epochs=60)
    log, words = submitted(job)
    number = machines.run("node0", *words, timeout_s=60).stdout.split()[-1]
    wait_for(machines, log, "epoch 1")
    machines.run("node0", "scancel", "--batch", "--signal=USR1", number)
    text = wait_for(machines, log, "stopped at step")
    assert "the same command goes on" in text
    while machines.run("node0", "squeue", "--noheader", "--format=%T").stdout.strip() != "PENDING":
        time.sleep(0.5)
    # Slurm leaves two minutes between a job and the same one begun again.
    machines.run("node0", "scontrol", "update", f"JobId={number}", "StartTime=now")
    wait_for(machines, log, "going on from step")  # Slurm has begun it again by itself
    machines.run("node0", "scancel", number)  # which it does not where a person ends it
    wait_until_empty(machines)
    assert not (tmp_path / "runs/run/model").exists()
    machines.run("node0", *words, timeout_s=60)
    wait_until_empty(machines)
    assert (tmp_path / "runs/run/model/model.safetensors").exists(), log.read_text()
    nothing_is_left(machines, tmp_path)


def test_without_a_job_it_says_what_it_wants() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: sbatch cluster/slurm.sh JOB.yaml [FLAGS OF FINETUNE]\n")
