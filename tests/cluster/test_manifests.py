"""The manifests for KubeRay, against its own definitions: the folder of these is named by KUBERAY_CRDS."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.strict import closed, problems, ray_problems, unnoticed
from tests.cluster.test_images import pins, version
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "cluster" / "kuberay"
KINDS = {"cluster.yaml": "RayCluster", "job.yaml": "RayJob"}
ANY_KEY = (r".*\b(nodeSelector|rayStartParams|matchLabels|labels|selector|requests|limits)\..*",)
METADATA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def crd(kind: str) -> dict[str, Any]:
    """The schema of version v1 of a kind, with nothing allowed that it does not name."""
    folder = os.environ.get("KUBERAY_CRDS")
    file = Path(folder or "") / f"ray.io_{kind.lower()}s.yaml"
    if not folder or not file.is_file():
        pytest.skip(f"KUBERAY_CRDS is {folder or 'not set'}: the folder with KubeRay's ray.io_*.yaml is wanted")
    definition = yaml.load(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = [one["schema"]["openAPIV3Schema"] for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema["properties"]["metadata"] = METADATA
    schema["properties"]["kind"] = {"enum": [kind]}
    schema["properties"]["apiVersion"] = {"enum": ["ray.io/v1"]}
    # KubeRay's own validation has these; the definition says no more than that it is a text.
    if kind == "RayJob":
        modes = ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
        schema["properties"]["spec"]["properties"]["submissionMode"] = {"enum": modes}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return closed(schema)


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    return {kind: crd(kind) for kind in KINDS.values()}


@pytest.mark.parametrize("name", KINDS)
def test_a_manifest_is_what_kuberay_reads(name: str, schemas: dict[str, dict[str, Any]]) -> None:
    manifest = yaml.safe_load((FOLDER / name).read_text())
    assert problems(manifest, schemas[KINDS[name]]) == []


@pytest.mark.parametrize("name", KINDS)
def test_a_misspelt_key_of_a_manifest_is_found(name: str, schemas: dict[str, dict[str, Any]]) -> None:
    manifest = yaml.safe_load((FOLDER / name).read_text())
    assert unnoticed(manifest, lambda one: problems(one, schemas[KINDS[name]]), ANY_KEY) == []


@pytest.mark.parametrize(
    ("key", "value"), [("submissionMode", "HttpMode"), ("backoffLimit", "two"), ("ttlSecondsAfterFinished", 1.5)]
)
def test_a_wrong_value_of_a_manifest_is_found(key: str, value: object, schemas: dict[str, dict[str, Any]]) -> None:
    manifest = yaml.safe_load((FOLDER / "job.yaml").read_text())
    manifest["spec"][key] = value
    (found,) = problems(manifest, schemas["RayJob"])
    assert found.startswith(f"spec.{key}: ")


def cluster_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KINDS)
def test_a_cluster_is_guarded_and_its_head_stays(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "orchestrator-token"}
    assert cluster["rayVersion"] == pins()["ray"]
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["template"]["spec"]["nodeSelector"] != worker["template"]["spec"]["nodeSelector"]
    for group, image in ((head, "cpu"), (worker, "cuda")):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == f"REGISTRY/orchestrator:{version()}-{image}"
        options = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        assert ray_problems(f"ray start {' '.join(options)}") == []
        assert not [one for one in container.get("env", []) if "TOKEN" in one["name"]], "it comes from the Secret"
    left = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    hook = worker["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert ray_problems(hook[2]) == []
    assert ray_problems(hook[2].replace("--reason-message", "--reason-mesage"))
    told, waits = re.findall(r"--deadline-remaining-seconds (\d+); sleep (\d+)", hook[2])[0]
    assert int(told) == int(waits) <= 10, "a spot node of Google gives a pod 15 s, and the command has to start"
    assert int(waits) < left
    subprocess.run(["bash", "-n", "-c", hook[2]], check=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_job_is_told_what_the_autoscaler_can_add(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pods of the workers have it: Ray counts what a pod requests."""
    from orchestrator.distributed import offer

    cluster = cluster_of(name)
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (said,) = [one["value"] for one in container["env"] if one["name"] == offer.NODE_TYPES]
    (worker,) = cluster["workerGroupSpecs"]
    requests = worker["template"]["spec"]["containers"][0]["resources"]["requests"]
    monkeypatch.setenv(offer.NODE_TYPES, said)
    wanted = {"CPU": int(requests["cpu"]), "GPU": int(requests["nvidia.com/gpu"])}
    assert offer._node_types() == [wanted] * worker["maxReplicas"]


def test_the_job_has_the_cluster_of_the_other_manifest() -> None:
    cluster, job = (copy.deepcopy(cluster_of(name)) for name in KINDS)
    pod = job["headGroupSpec"]["template"]["spec"]
    for inside, key in ((pod, "volumes"), (pod["containers"][0], "volumeMounts")):
        assert inside.pop(key)
    assert job == cluster


def test_redis_is_what_the_head_looks_for(schemas: dict[str, dict[str, Any]]) -> None:
    service, stateful = yaml.safe_load_all((FOLDER / "redis.yaml").read_text())
    options = cluster_of("cluster.yaml")["gcsFaultToleranceOptions"]
    name, port = options["redisAddress"].split(":")
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (name, int(port))
    assert stateful["spec"]["serviceName"] == name
    pod = stateful["spec"]["template"]
    assert service["spec"]["selector"] == stateful["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    # Of Kubernetes' own kinds nothing is here but the pod that KubeRay's definitions repeat.
    spec = schemas["RayCluster"]["properties"]["spec"]["properties"]
    of_pod = spec["headGroupSpec"]["properties"]["template"]["properties"]["spec"]
    assert problems(pod["spec"], of_pod) == []
    assert unnoticed(pod["spec"], lambda one: problems(one, of_pod), ANY_KEY) == []
    (secret,) = [one["valueFrom"]["secretKeyRef"] for one in pod["spec"]["containers"][0]["env"]]
    assert secret == options["redisPassword"]["valueFrom"]["secretKeyRef"]
