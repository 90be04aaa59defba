"""Under which key features are kept, and that all workers have the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from orchestrator.errors import TrainingError
from orchestrator.features.key import FeatureCacheRef, code_digest, feature_key, view_name
from orchestrator.modality import registry
from orchestrator.network import Cut

CUT = Cut(("classifier",), "chain")
# One of two workers, whose torch is another one where that is asked for.
WORKER = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
import orchestrator
from orchestrator.errors import TrainingError
from orchestrator.features import key
from orchestrator.job import DirectoryStorage, HeldRun, Lease
from orchestrator.modality import registry
from orchestrator.network import Cut, start_worker
backbone, data, rank, torch_version = sys.argv[1:]
if torch_version:
    theirs = key._version
    key._version = lambda library: torch_version if library == "torch" else theirs(library)
plan = orchestrator.plan(backbone=backbone, data=data)
dist.init_process_group("gloo", init_method=f"file://{Path('meeting').absolute()}", rank=int(rank), world_size=2)
with start_worker(1, torch.device("cpu")) as worker:
    try:
        cut, run = Cut(("classifier",), "chain"), HeldRun(DirectoryStorage(Path.cwd()), Lease("run", "me", 1, "token"))
        cache = key.agreed_cache(plan, run, cut, registry.get("image"), worker)
        print("agreed", cache.group.name)
    except TrainingError as error:
        print("refused", error.message)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("version", ["", "1.0.other"])
def test_a_worker_that_would_compute_other_features_ends_the_job_on_all(
    version: str, tiny_resnet: Path, flat_digits: Path
) -> None:
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, tiny_resnet, flat_digits, rank, version if rank == "1" else ""],
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in "01"
    ]  # fmt: skip
    outs = [worker.communicate(timeout=250) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outs
    said = [out.strip() for out, _ in outs]
    assert said[0] == said[1]
    if version:
        assert said[0].startswith("refused the worker of rank 1 would compute other features than the worker of rank 0")
        assert version in said[0]
    else:
        assert said[0].startswith("agreed tiny-resnet")


def test_a_process_with_other_libraries_does_not_extract(tiny_resnet: Path, flat_digits: Path, tmp_path: Path) -> None:
    plan, image = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits)), registry.get("image")
    key = feature_key(plan, CUT, code_digest(image))
    FeatureCacheRef(CUT, key, tmp_path, None).require_same(plan, image)
    other = {**key, "libraries": {**key["libraries"], "pillow": "1.0"}}
    with pytest.raises(TrainingError, match=r'this process would compute other features .*"pillow": "1.0"') as refused:
        FeatureCacheRef(CUT, other, tmp_path, None).require_same(plan, image)
    assert refused.value.mend


def test_another_build_of_torch_is_the_same_torch(
    tiny_resnet: Path, flat_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extractor on a node without a GPU works for workers that have one."""
    plan, image = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits)), registry.get("image")
    keys = []
    for build in ("+cpu", "+cu126", ".1+cpu"):
        monkeypatch.setattr("orchestrator.features.key.version", lambda _library, build=build: f"2.14{build}")
        keys.append(feature_key(plan, CUT, code_digest(image)))
    assert keys[0] == keys[1] != keys[2]


def test_what_no_distribution_brings_has_no_code_that_others_could_compare() -> None:
    """On a worker, a modality that the driver's program has registered: its file is not all that it computes by."""
    image = registry.get("image")
    assert code_digest(image) is not None
    assert code_digest(dataclasses.replace(image, name="scan")) is None


def test_views_differ_by_what_the_settings_alone_say(tiny_resnet: Path, flat_digits: Path) -> None:
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits))
    weak, strong = (
        plan.model_copy(update={
            "augmentation": ("strength",), "job": plan.job.model_copy(update={"settings": {"strength": strength}})
        })
        for strength in (1, 9)
    )  # fmt: skip
    assert view_name(weak, 0) != view_name(strong, 0)
