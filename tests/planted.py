"""Secrets in the environment of whoever starts a job, and a look at all places where others could see them."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cluster.local import LocalCluster
from tests.chaos.work import descendants

PLANTED = {
    "HF_TOKEN": "hf_planted0000000000000000000000000",
    "AWS_SECRET_ACCESS_KEY": "planted1planted1planted1planted1",
    "MY_PASSWORD": "planted2planted2",
}
_SHOWN = (
    "/api/jobs/", "/api/v0/tasks?detail=1", "/api/v0/actors?detail=1", "/api/v0/runtime_envs",
    "/api/v0/workers?detail=1", "/nodes?view=summary", "/api/v0/jobs?detail=1", "/api/cluster_status",
)  # fmt: skip


def seen_at_work(cluster: LocalCluster, job: str = "", of: int = 0) -> dict[str, str]:
    """{place: what is to be read there} while a job runs, submitted under that id, or started by the process `of`.

    Command lines, the environments of the cluster's processes (but of that one and its children, which have the
    secrets from the person who started them), and what the head shows over HTTP.
    """
    import httpx2

    own = {of, *descendants(of)} if of else set()
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    seen = {"ps": "\n".join([listed, *cluster.processes("").values()])}
    for pid in set(cluster.processes("")) - own:
        with contextlib.suppress(OSError):
            seen[f"environment of {pid}"] = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    headers = {"Authorization": f"Bearer {cluster.token_file.read_text()}"}
    with httpx2.Client(base_url=cluster.dashboard, headers=headers) as head:
        for path in (*_SHOWN, *((f"/api/jobs/{job}", f"/api/jobs/{job}/logs") if job else ())):
            answer = head.get(path)
            assert answer.status_code == 200, (path, answer.text)
            seen[path] = answer.text
    return seen


def seen_in_files(cluster: LocalCluster, *folders: Path) -> dict[str, str]:
    """{file: its content}: the cluster's own files, logs among them, and those of these folders."""
    return {
        str(file): file.read_bytes().decode(errors="replace")
        for folder in (cluster.folder, *folders) for file in folder.rglob("*")
        if file.is_file() and file != cluster.token_file and not file.is_symlink()
    }  # fmt: skip


def found_in(seen: Mapping[str, str], cluster: LocalCluster) -> list[tuple[str, str]]:
    """(secret, place) of each that is to be read somewhere, the cluster's token among them."""
    secrets = {**PLANTED, "token": cluster.token_file.read_text()}
    return [
        (name, place) for place, text in seen.items() for name, value in secrets.items()
        if value in text
    ]  # fmt: skip
