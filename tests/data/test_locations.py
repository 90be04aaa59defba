"""Tables and files in an S3 store (moto's server on 127.0.0.1) and behind fsspec; the same data as in a folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

import orchestrator
from orchestrator.data import UnansweredError, Unlabelled, ingest, unlabelled
from orchestrator.data.prepare import Prepared, prepare_data
from orchestrator.data.samples import Samples
from orchestrator.errors import BadSampleError, RefusedError
from orchestrator.job.plans import BackboneCard
from orchestrator.job.spec import Data
from orchestrator.modality import registry
from tests import s3_proxy
from tests.data.test_prepare import into, png

CARD = BackboneCard(source="b", kind="directory", name="b")


def put(store: Any, name: str, content: bytes) -> None:
    with store.open_output_stream(name) as out:
        out.write(content)


def read(place: str, modality: str = "image", **settings: Any) -> Prepared:
    return prepare_data(Data(path=place, **settings), registry.get(modality), CARD, directory=into())


def refusal(place: str, **settings: Any) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        read(place, **settings)
    return caught.value


def samples(field: str = "image") -> Samples:
    return Samples(Path("samples").absolute(), (field,))


def local_and_stored(store: Any, root: Path, num: int = 20) -> None:
    """The same images in class folders here and there."""
    for i in range(num):
        name = f"{'cat' if i % 2 else 'dog'}/{i:02}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(i * 9))
        put(store, f"photos/{name}", png(i * 9))


def test_a_folder_in_a_store_is_the_folder_here(bucket: Any, tmp_path: Path) -> None:
    local_and_stored(bucket, tmp_path / "photos")
    put(bucket, "photos/cat/notes.txt", b"hello")
    put(bucket, "photos/.hidden/x.png", b"")
    here, there = read(str(tmp_path / "photos")), read("s3://bucket/photos/")
    assert there.classes == here.classes
    assert there.summary.num_samples == here.summary.num_samples
    assert there.summary.fingerprint == here.summary.fingerprint
    assert there.profile == here.profile
    assert "1 file that is no image, not read: cat/notes.txt" in there.summary.notes
    found = samples()
    assert found.read(0)["image"] == png(9)
    assert found.place(0) == "s3://bucket/photos/cat/01.png"
    bucket.delete_file("photos/cat/01.png")
    with pytest.raises(BadSampleError, match="cannot be read"):
        found.read(0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_table_in_a_store_with_files_beside_it(bucket: Any, tmp_path: Path, suffix: str) -> None:
    from tests.data.test_prepare import table

    local_and_stored(bucket, tmp_path / "photos")
    rows: list[dict[str, object]] = [
        {"path": f"{'cat' if i % 2 else 'dog'}/{i:02}.png", "label": "cat" if i % 2 else "dog"} for i in range(20)
    ]
    file = table(tmp_path / f"t{suffix}", rows)
    put(bucket, f"photos/t{suffix}", file.read_bytes())
    here = read(str(file), root=str(tmp_path / "photos"))
    assert read(f"s3://bucket/photos/t{suffix}").summary.fingerprint == here.summary.fingerprint
    assert samples().read(3)["image"] == png(27)
    # A table here, with the files there: by whole URIs, too.
    whole = table(tmp_path / f"w{suffix}", [{**row, "path": f"s3://bucket/photos/{row['path']}"} for row in rows])
    assert read(str(whole), root="s3://bucket/photos").summary.fingerprint == here.summary.fingerprint
    error = refusal(str(whole))
    assert "lies in a store, outside of" in error.message
    assert "data.root" in error.mend


def test_a_table_in_parts(bucket: Any, tmp_path: Path) -> None:
    """A folder of Parquet files, as Spark and Ray write it, is one table."""
    for part in range(3):
        rows = [{"text": f"text {part} {i}", "label": i % 2} for i in range(10)]
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
        put(bucket, f"texts/part-{part}.parquet", (tmp_path / "p.parquet").read_bytes())
    put(bucket, "texts/_SUCCESS", b"")
    found = read("s3://bucket/texts", "text")
    assert sum(found.summary.num_samples.values()) == 30
    put(bucket, "texts/part-1.parquet", b"cut")
    assert "s3://bucket/texts/part-1.parquet cannot be read" in refusal("s3://bucket/texts", modality="text").message


def test_what_is_not_there(bucket: Any) -> None:
    assert refusal("s3://bucket/nothing").message == "there is no s3://bucket/nothing"
    assert refusal("s3://nobucket/nothing").message == "there is no s3://nobucket/nothing"
    assert "nothing://x/y is no place that can be opened" in refusal("nothing://x/y").message
    put(bucket, "t.csv", b"path,label\na.png,x\nb.png,y\n../c.png,y\n")
    error = refusal("s3://bucket/t.csv")
    assert "row 3: the path '../c.png' leaves the data's root s3://bucket" in error.message
    put(bucket, "u.csv", b"path,label\na.png,x\nb.png,y\n")
    assert "s3://bucket/u.csv row 1: the file a.png is missing" in refusal("s3://bucket/u.csv").message


@pytest.mark.usefixtures("bucket")
def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    error = refusal("s3://bucket/photos")
    assert error.reason == "offline"
    assert "s3://bucket/photos does not answer" in error.message
    assert "AWS_ENDPOINT_URL" in error.mend


def goes_away(proxy: s3_proxy.Proxy, num_read: int, seconds: float) -> None:
    """The store, once so many images were asked for."""
    left = [num_read]

    def look(_method: str, path: str) -> None:
        left[0] -= path.endswith(".png")
        if left[0] == 0:
            proxy.away_until = time.monotonic() + seconds

    proxy.on_request = look


@pytest.mark.parametrize("place", ["photos", "photos/t.csv"])
def test_a_store_that_is_away_while_the_data_is_read_makes_no_bad_samples(
    place: str, proxy: s3_proxy.Proxy, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than its own client asks it again."""
    local_and_stored(bucket, tmp_path / "photos")
    lines = [f"{'cat' if i % 2 else 'dog'}/{i:02}.png,{i % 2}\n" for i in range(20)]
    put(bucket, "photos/t.csv", ("path,label\n" + "".join(lines)).encode())
    whole = read(f"s3://bucket/{place}", on_bad_sample="skip")
    goes_away(proxy, 10, 8.0)
    found = read(f"s3://bucket/{place}", on_bad_sample="skip")
    assert not found.skipped
    assert found.summary.fingerprint == whole.summary.fingerprint
    monkeypatch.setattr(ingest, "PATIENCE_S", 0.5)
    goes_away(proxy, 10, 600.0)
    began = time.monotonic()
    error = refusal(f"s3://bucket/{place}", on_bad_sample="skip")
    assert error.reason == "offline"
    assert "s3://bucket/photos/" in error.message
    assert time.monotonic() - began < 5  # nobody waits for each of the others


def test_what_a_run_is_asked_about_in_a_store_that_is_away_is_waited_for(
    proxy: s3_proxy.Proxy, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_and_stored(bucket, tmp_path / "photos")
    files = [Unlabelled(i, "", {"image": b""}, f"s3://bucket/photos/{'cat' if i % 2 else 'dog'}/{i:02}.png")
             for i in range(10)]  # fmt: skip
    goes_away(proxy, 5, 8.0)
    assert all(file.read()["image"] for file in files)
    with pytest.raises(FileNotFoundError):
        Unlabelled(11, "", {"image": b""}, "s3://bucket/photos/none.png").read()
    monkeypatch.setattr(unlabelled, "PATIENCE_S", 0.5)
    goes_away(proxy, 1, 600.0)
    with pytest.raises(RefusedError, match=r"s3://bucket/photos/dog/00\.png") as caught:
        files[0].read()
    assert caught.value.reason == "offline"


def test_what_is_a_sample_of_a_store_that_fails(proxy: s3_proxy.Proxy, bucket: Any, tmp_path: Path) -> None:
    local_and_stored(bucket, tmp_path / "photos")
    read("s3://bucket/photos")
    found = samples()
    for fault in ("500", "cut"):
        proxy.always = fault  # type: ignore[assignment]
        with pytest.raises(UnansweredError):
            found.read(0)
    proxy.always = "403"
    with pytest.raises(BadSampleError, match="cannot be read"):
        found.read(0)


def test_of_many_files_in_a_store_some_are_read(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder the listing tells sizes; of a table's files the store is asked about the measured ones alone."""
    monkeypatch.setattr(ingest, "NUM_MEASURED_ALL", 10)
    monkeypatch.setattr(ingest, "NUM_MEASURED", 5)
    local_and_stored(bucket, tmp_path / "photos")
    assert read("s3://bucket/photos").profile.num_measured == 5
    lines = [f"{'cat' if i % 2 else 'dog'}/{i:02}.png,{i % 2}\n" for i in range(20)]
    put(bucket, "photos/t.csv", ("path,label\n" + "".join(lines)).encode())
    first = read("s3://bucket/photos/t.csv")
    assert first.profile.num_measured == 5
    assert first.summary.num_samples == {"train": 16, "validation": 2, "test": 2}


def test_what_fsspec_opens() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for i in range(20):
            memory.pipe(f"/photos/{'cat' if i % 2 else 'dog'}/{i}.png", png(i * 9))
        found = read("memory://photos")
        assert found.classes == ("cat", "dog")
        assert samples().read(0)["image"] in [png(i * 9) for i in range(20)]
    finally:
        memory.rm("/photos", recursive=True)


@pytest.mark.slow
def test_a_job_on_a_store_is_the_job_on_the_folder(bucket: Any, tiny_resnet: Path, digits: Path) -> None:
    root = Path("here")
    for file in sorted(digits.rglob("[01]/*.png"))[::2]:
        name = str(file.relative_to(digits))
        put(bucket, f"digits/{name}", file.read_bytes())
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, root / name)
    job: dict[str, Any] = {"backbone": str(tiny_resnet), "training": {"epochs": 2}, "report": lambda _: None}
    job["method"] = "head"
    there = orchestrator.finetune(data="s3://bucket/digits", **job)
    here = orchestrator.finetune(data=str(root), **job)
    assert there.results["test"] == here.results["test"]
    assert orchestrator.evaluate(there, "s3://bucket/digits")["num_seen"] == 0  # its test split alone counts
    assert there.plan.job.data.path == "s3://bucket/digits"
