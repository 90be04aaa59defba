"""The files of `ray up`, against Ray's schema and the clouds' own; and the notice of a spot machine."""

from __future__ import annotations

import http.server
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.strict import closed, problems, ray_problems, unnoticed
from tests.cluster.test_images import version
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "vms"
CLOUDS = ("aws", "gcp")
TEXT, WHOLE, SWITCH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
# What of a machine of Google's the file uses: compute v1, `Instance`. Neither Ray nor its tests have a schema of it.
GCP_NODE = closed({
    "type": "object", "required": ["machineType", "disks"],
    "properties": {
        "machineType": TEXT,
        "disks": {"type": "array", "items": {"type": "object", "properties": {
            "boot": SWITCH, "autoDelete": SWITCH, "type": {"enum": ["PERSISTENT", "SCRATCH"]},
            "initializeParams": {"type": "object", "properties": {"diskSizeGb": WHOLE, "sourceImage": TEXT}},
        }}},
        "scheduling": {"type": "object", "properties": {
            "provisioningModel": {"enum": ["SPOT", "STANDARD"]}, "automaticRestart": SWITCH,
            "instanceTerminationAction": {"enum": ["DELETE", "STOP"]},
            "onHostMaintenance": {"enum": ["MIGRATE", "TERMINATE"]},
        }},
        "serviceAccounts": {"type": "array", "items": {"type": "object", "properties": {
            "email": TEXT, "scopes": {"type": "array", "items": TEXT},
        }}},
    },
})  # fmt: skip
PROVIDERS = {
    "aws": {"type", "region", "availability_zone", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "project_id"},
}
ANY_KEY = (r"file_mounts\..*", r"available_node_types\.[^.]*", r".*\.resources\..*")


def aws_problems(node: dict[str, Any]) -> list[str]:
    """What Amazon's own description of RunInstances says."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    return list(ParamValidator().validate({**node, "MinCount": 1, "MaxCount": 1}, shape)._errors)


def file_problems(config: dict[str, Any]) -> list[str]:
    """What `ray up` would refuse, and what the cloud would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(config))
    except (jsonschema.ValidationError, ValueError, KeyError, TypeError, AssertionError) as error:
        return [str(error)]
    cloud = config["provider"]["type"]
    found = sorted(set(config["provider"]) - PROVIDERS[cloud])
    for one in config["available_node_types"].values():
        node = one["node_config"]
        found += map(str, aws_problems(node)) if cloud == "aws" else problems(node, GCP_NODE)
    if config["head_node_type"] not in config["available_node_types"]:
        found.append("there is no such type for the head")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in config.get(key, ["missing"]):
            found += ray_problems(line)
            if subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode:
                found.append(line)
    return found


def config_of(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((FOLDER / f"{cloud}.yaml").read_text())
    return config


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_reads_the_file(cloud: str) -> None:
    assert file_problems(config_of(cloud)) == []


@pytest.mark.parametrize("cloud", [pytest.param("aws", marks=pytest.mark.long), "gcp"])
def test_a_misspelt_key_of_the_file_is_found(cloud: str) -> None:
    assert unnoticed(config_of(cloud), file_problems, ANY_KEY) == []


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_misspelt_option_of_ray_is_found(cloud: str) -> None:
    config = config_of(cloud)
    config["worker_start_ray_commands"][1] = "ray start --adress=$RAY_HEAD_IP:6379"
    (found,) = file_problems(config)
    assert "No such option" in found


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_stays_and_the_workers_are_spot_machines(cloud: str) -> None:
    config = config_of(cloud)
    head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
    assert (head["resources"], worker["min_workers"]) == ({"CPU": 0}, 0)
    assert "SPOT" not in str(head["node_config"]).upper()
    assert "SPOT" in str(worker["node_config"]).upper()
    assert config["docker"]["head_image"] == f"REGISTRY/orchestrator:{version()}-cpu"
    assert config["docker"]["worker_image"] == f"REGISTRY/orchestrator:{version()}-cuda"
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    assert f"notice {cloud} " in config["worker_start_ray_commands"][-1]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_docker_is_given_each_option_once(cloud: str) -> None:
    """Of the command that Ray makes: docker refuses a network that is named twice."""
    from ray.autoscaler._private.docker import docker_start_cmds

    docker = config_of(cloud)["docker"]
    line = docker_start_cmds(
        "ray", docker["head_image"], {}, "name", docker["run_options"], "one", "/home/ray", "docker"
    )
    names = [word.partition("=")[0].replace("--network", "--net") for word in line.split() if word.startswith("--")]
    repeated = {name for name in names if names.count(name) > 1} - {"--env", "--ulimit"}
    assert (repeated, "--net" in names) == (set(), True)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_job_is_told_what_ray_up_can_add(cloud: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from orchestrator.distributed import offer

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text((FOLDER / f"{cloud}.yaml").read_text())
    assert offer._node_types() == [{"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}] * 8


# --- notice.sh ---


class Metadata(http.server.ThreadingHTTPServer):
    """The metadata service of a machine, as both clouds have it, on 127.0.0.1."""

    taken_away = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str]] = []
        self.asked_often = threading.Event()

    @property
    def place(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def answer(self) -> None:
        self.server.asked.append((self.command, self.path))
        if len(self.server.asked) > 4:
            self.server.asked_often.set()
        code, text = 404, ""
        if (self.command, self.path) == ("PUT", "/latest/api/token"):
            code, text = 200, "a-token"
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.taken_away:
            code = 200 if self.headers["X-aws-ec2-metadata-token"] == "a-token" else 401
        elif self.path == "/computeMetadata/v1/instance/preempted" and self.headers["Metadata-Flavor"] == "Google":
            code, text = 200, "TRUE" if self.server.taken_away else "FALSE"
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = answer

    def log_message(self, *_: object) -> None:
        """Not on the terminal."""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("cloud", "left_s"), [("aws", 110), ("gcp", 25)])
def test_a_notice_of_the_cloud_is_passed_on_to_ray(cloud: str, left_s: int, metadata: Metadata, tmp_path: Path) -> None:
    """What it calls is put into a file: whether Ray takes it is in tests/cluster/test_local.py."""
    ray = tmp_path / "ray"
    ray.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" > {tmp_path}/called\n')
    ray.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "METADATA": metadata.place, "EVERY_S": "0.05",
        "RAY_ADDRESS": "10.213.0.10:6379",
    }  # fmt: skip
    notice = subprocess.Popen([FOLDER / "notice.sh", cloud], env=environment, stdout=subprocess.PIPE, text=True)
    assert metadata.asked_often.wait(60)
    assert notice.poll() is None
    assert not (tmp_path / "called").exists()
    metadata.taken_away = True
    said, _ = notice.communicate(timeout=60)
    assert notice.returncode == 0
    assert f"{left_s} s" in said
    called = (tmp_path / "called").read_text().strip()
    assert f"--deadline-remaining-seconds {left_s}" in called
    words = "'the cloud takes this machine away'"
    assert ray_problems(f"ray {called.replace(words.strip(chr(39)), words)}") == []


def test_a_cloud_that_is_none_is_said() -> None:
    done = subprocess.run([FOLDER / "notice.sh", "azure"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: notice aws|gcp\n")


def test_scripts_can_be_run() -> None:
    scripts = sorted((REPOSITORY / "cluster").rglob("*.sh"))
    assert [one.name for one in scripts] == ["slurm.sh", "notice.sh"]
    for one in scripts:
        assert one.stat().st_mode & stat.S_IXUSR
        assert one.read_text().startswith("#!/usr/bin/env bash\n")
