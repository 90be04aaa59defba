"""Data sets of the Hub and of save_to_disk: the real library, against the Hub on 127.0.0.1."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

import orchestrator
from orchestrator.data.prepare import Prepared, prepare_data
from orchestrator.data.samples import Samples
from orchestrator.errors import OrchestratorError, RefusedError
from orchestrator.job.places import is_dataset, whole
from orchestrator.job.plans import BackboneCard
from orchestrator.job.spec import Data
from orchestrator.modality import registry
from tests.data.test_prepare import into, png
from tests.hub_server import Hub, Repository

CARD = BackboneCard(source="b", kind="directory", name="b")
CARD_OF_NAMES = b"""---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': negative
          '1': positive
---
"""


def read(place: object, modality: str = "text", **settings: Any) -> Prepared:
    return prepare_data(Data(path=str(place), **settings), registry.get(modality), CARD, directory=into())


def refusal(place: object, **settings: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        read(place, **settings)
    return caught.value


def texts(start: int, num: int) -> bytes:
    out = io.BytesIO()
    rows = range(start, start + num)
    pyarrow.parquet.write_table(pa.table({"text": [f"text {i}" for i in rows], "label": [i % 2 for i in rows]}), out)
    return out.getvalue()


@pytest.fixture
def reviews(hub: Hub) -> Repository:
    files = {"README.md": CARD_OF_NAMES, "data/train-00000-of-00001.parquet": texts(0, 40)}
    hub.repositories["datasets/org/reviews"] = Repository({**files, "data/test-00000-of-00001.parquet": texts(40, 10)})
    return hub.repositories["datasets/org/reviews"]


@pytest.mark.parametrize("place", ["org/reviews", "hf://datasets/org/reviews", "hf://datasets/org/reviews@main"])
def test_a_repository_with_splits_and_named_classes(reviews: Repository, place: str) -> None:
    found = read(place)
    assert found.classes == ("negative", "positive")
    assert found.summary.num_samples == {"train": 36, "validation": 4, "test": 10}
    assert f"org/reviews at commit {reviews.sha}" in found.summary.notes
    samples = Samples(Path("samples").absolute(), ("text",))
    assert samples.read(3) == {"text": b"text 3"}
    assert samples.targets[3] == 1


def test_images_in_class_folders_of_a_repository_come_with_their_bytes(hub: Hub) -> None:
    files = {f"train/{'cat' if i % 2 else 'dog'}/{i}.png": png(i * 9) for i in range(20)}
    hub.repositories["datasets/org/photos"] = Repository(files)
    found = read("org/photos", "image")
    assert found.classes == ("cat", "dog")
    samples = Samples(Path("samples").absolute(), ("image",))
    assert {samples.read(i)["image"] for i in range(20)} == set(files.values())  # no need of the library's cache


def test_what_the_hub_does_not_have(hub: Hub, reviews: Repository, tmp_path: Path) -> None:
    error = refusal("org/nothing")
    assert error.reason == "not_found"
    assert "there is no directory org/nothing, and the Hub has no such repository" in error.message
    assert refusal("org/reviews@nowhere").reason == "bad_revision"
    reviews.gated = True
    assert refusal("org/reviews").reason == "gated"
    hub.repositories["datasets/org/empty"] = Repository({"README.md": b"nothing here"})
    assert "org/empty cannot be read as a data set" in refusal("org/empty").message
    hub.repositories["datasets/org/broken"] = Repository({"train.parquet": b"PAR1 no parquet PAR1"})
    assert "org/broken cannot be read as a data set" in refusal("org/broken").message
    hub.repositories["datasets/org/code"] = Repository({"code.py": b"raise SystemExit('ran')"})
    assert "org/code cannot be read as a data set" in refusal("org/code").message
    # What is here wins: a misspelt folder is not looked up anywhere.
    (tmp_path / "photos").mkdir()
    assert refusal("photos/trian").message == "there is no photos/trian"


def test_a_repository_of_several_subsets_asks_for_one(hub: Hub) -> None:
    names = b"---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.csv\n---\n"
    lines = "".join(f"text {i},{i % 2}\n" for i in range(20))
    files = {"README.md": names, "a.csv": f"text,label\n{lines}".encode(), "b.csv": f"text,label\n{lines}".encode()}
    hub.repositories["datasets/org/several"] = Repository(files)
    error = refusal("org/several")
    assert "has several subsets" in error.message
    assert "data.subset" in error.mend
    assert sum(read("org/several", subset="a").summary.num_samples.values()) == 20
    assert "data.subset is 'c'" in refusal("org/several", subset="c").message


def test_what_is_a_data_set_and_what_a_path(tmp_path: Path) -> None:
    assert is_dataset("org/name")
    assert is_dataset("hf://datasets/org/name@abc")
    (tmp_path / "here").mkdir()
    for path in ("photos", "here/name", "org/table.csv", "./org/name", "/org/name", "a/b/c", "s3://bucket/name",
                 "hf://datasets/org/name/file.parquet"):  # fmt: skip
        assert not is_dataset(path)
    assert whole("org/name") == "org/name"
    assert whole("s3://bucket/folder/") == "s3://bucket/folder"
    assert whole("here") == str(tmp_path / "here")


@pytest.mark.parametrize("form", ["one", "splits"])
def test_a_directory_that_save_to_disk_wrote(tmp_path: Path, form: str) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["dark", "bright"]),
            "kinds": datasets.List(datasets.ClassLabel(names=["red", "green"])),
        }
    )
    rows = [
        {"image": {"bytes": png(i * 9), "path": None}, "label": i % 2, "kinds": [0, 1] if i % 3 else []}
        for i in range(20)
    ]
    one = datasets.Dataset.from_list(rows, features=features)
    made = one if form == "one" else datasets.DatasetDict({"train": one, "test": one.select(range(4))})
    made.save_to_disk(str(tmp_path / "saved"))
    found = read(tmp_path / "saved", "image")
    assert found.classes == ("bright", "dark")
    assert found.summary.num_samples["test"] == (2 if form == "one" else 4)
    samples = Samples(Path("samples").absolute(), ("image",))
    assert samples.read(5)["image"] == png(45)
    many = prepare_data(
        Data(path=str(tmp_path / "saved"), label_column="kinds"), registry.get("image"), CARD, "multi-label"
    )
    assert many.classes == ("green", "red")
    (tmp_path / "saved" / ("state.json" if form == "one" else "dataset_dict.json")).write_text("{")
    assert "cannot be read" in refusal(tmp_path / "saved").message


def test_a_file_that_a_data_set_names_elsewhere_is_not_read(tmp_path: Path) -> None:
    """A path in a cell may not leave the data's root, whoever wrote the cell."""
    import datasets

    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    rows = [{"image": {"bytes": None, "path": str(secret)}, "label": i % 2} for i in range(4)]
    features = datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
                                  "label": datasets.Value("int64")})  # fmt: skip
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(OrchestratorError, match="leaves the data's root"):
        read(tmp_path / "saved", "image")


@pytest.mark.slow
def test_a_data_set_of_the_hub_trains(hub: Hub, tiny_resnet: Path, digits: Path) -> None:
    chosen = [*sorted((digits / "train").glob("[01]/*.png"))[::4], *sorted((digits / "test").glob("[01]/*.png"))[:10]]
    files = {str(file.relative_to(digits)): file.read_bytes() for file in chosen}
    hub.repositories["datasets/org/digits"] = Repository(files)
    run = orchestrator.finetune(
        method="head", backbone=str(tiny_resnet), data="org/digits", training={"epochs": 2}, report=lambda _: None
    )
    assert run.results["test"]["num_samples"] == 10
    assert run.plan.job.data.path == "org/digits"
