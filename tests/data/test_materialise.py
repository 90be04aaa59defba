"""Rows that a program holds: an iterable, a table in memory, a Ray or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

import orchestrator
from orchestrator.data.materialise import _of_rows, materialise_rows
from orchestrator.errors import DataError, RefusedError
from orchestrator.job import Event
from tests.data.test_prepare import png


def rows(num: int = 20) -> Iterator[dict[str, Any]]:
    for i in range(num):
        yield {"image": png(i * 9), "label": "cat" if i % 2 else "dog", "speaker": f"s{i // 4}"}


def of_pandas() -> Any:
    import pandas

    return pandas.DataFrame(list(rows()))


def of_datasets() -> Any:
    import datasets

    return datasets.Dataset.from_list(list(rows())).cast_column("image", datasets.Image())


def pandas_series() -> Any:
    import pandas

    return pandas.Series(["a", "b"])


FORMS: dict[str, Callable[[], Any]] = {
    "generator": rows,
    "list": lambda: list(rows()),
    "pyarrow": lambda: pa.Table.from_pylist(list(rows())),
    "pandas": of_pandas,
    "datasets": of_datasets,
}


def written(data: Any, folder: Path = Path("materialised")) -> dict[str, Any]:
    found = materialise_rows(data, folder)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str) -> None:
    found = written(FORMS[form]())
    table = pyarrow.parquet.read_table(found["path"]).to_pylist()
    cells = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in table]
    assert cells == [row["image"] for row in rows()]
    assert [row["label"] for row in table] == [row["label"] for row in rows()]
    assert found["root"] == str(Path.cwd())


def test_paths_are_relative_to_where_the_program_runs(tiny_resnet: Path) -> None:
    named = []
    for i, row in enumerate(rows()):
        Path(f"{i}.png").write_bytes(row["image"])
        named.append({"image": Path(f"{i}.png"), "label": row["label"]})
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=named)
    assert sum(plan.data.num_samples.values()) == 20
    assert plan.data.root == str(Path.cwd())


def test_the_same_rows_have_the_same_name_and_others_another() -> None:
    assert written(rows()) == written(list(rows()))
    assert written(rows()) != written(rows(19))
    assert len(list(Path("materialised").iterdir())) == 2  # and nothing half written


def test_splits_and_settings_beside_the_rows() -> None:
    import datasets

    found = written({"path": rows(), "test": list(rows(4)), "label_column": "label", "validation": "here/val"})
    assert pyarrow.parquet.read_table(found["test"]).num_rows == 4
    assert found["label_column"] == "label"
    assert found["validation"] == "here/val"
    places = {"path": "photos", "test": "others"}
    assert materialise_rows(places, Path("materialised")) is places
    one = datasets.Dataset.from_list(list(rows(6)))
    both = written(datasets.DatasetDict({"train": one, "test": one.select(range(2))}))
    assert pyarrow.parquet.read_table(both["path"]).num_rows == 6
    assert pyarrow.parquet.read_table(both["test"]).num_rows == 2


def test_large_rows_are_not_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many of 2 MB that a thousand of them would be 2 GiB; here the bound is made small."""
    monkeypatch.setattr("orchestrator.data.materialise._CHUNK_BYTES", 50_000, raising=False)
    made = written = 0
    most = 0

    def large() -> Iterator[dict[str, Any]]:
        nonlocal made, most
        for i in range(400):
            made += 1
            most = max(most, made - written)
            yield {"image": bytes(10_000), "label": None if i < 4 else i % 2, "tags": [] if i < 8 else ["a"]}

    batches = []
    for batch in _of_rows(large()):
        written += batch.num_rows
        batches.append(batch.num_rows)
    assert most <= 7
    assert sum(batches) == 400


def splits_of(*names: str) -> Any:
    import datasets

    one = datasets.Dataset.from_list(list(rows(6))).cast_column("image", datasets.Image())
    return datasets.DatasetDict({name: one for name in names})


@pytest.mark.parametrize("name", ["train", "test", "anything"])
def test_a_data_set_of_one_split_is_ours_to_split(name: str) -> None:
    for data in (splits_of(name), {"path": splits_of(name), "label_column": "label"}):
        found = written(data)
        assert pyarrow.parquet.read_table(found["path"]).num_rows == 6
        assert "test" not in found
    found = written(
        {"path": splits_of("train", name)} if name == "test" else {"path": rows(6), "test": splits_of(name)}
    )
    assert pyarrow.parquet.read_table(found["test"]).num_rows == 6


def test_splits_that_are_given_twice_or_are_none() -> None:
    with pytest.raises(DataError, match=r"data.test is given, and the data set has a split test"):
        written({"path": splits_of("train", "test"), "test": list(rows(4))})
    with pytest.raises(DataError, match=r"data.test is a data set of the splits train, test"):
        written({"path": rows(4), "test": splits_of("train", "test")})
    with pytest.raises(DataError, match="none for training"):
        written(splits_of("a", "test"))


@pytest.mark.parametrize("form", ["of_list", "of_generator", "splits", "reader", "batch", "dataset"])
def test_rows_that_come_one_after_the_other(form: str) -> None:
    import datasets
    import pyarrow.dataset as pd

    table = pa.Table.from_pylist(list(rows()))
    named = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["dog", "cat"]),
        "speaker": datasets.Value("string"),
    }
    numbers = [{**row, "image": {"bytes": row["image"], "path": None}, "label": i % 2} for i, row in enumerate(rows())]
    whole = datasets.Dataset.from_list(numbers, features=datasets.Features(named))
    data = {
        "of_list": lambda: whole.to_iterable_dataset(),
        "of_generator": lambda: datasets.IterableDataset.from_generator(rows),
        "splits": lambda: datasets.IterableDatasetDict({"train": whole.to_iterable_dataset()}),
        "reader": lambda: pa.RecordBatchReader.from_batches(table.schema, table.to_batches(7)),
        "batch": lambda: table.combine_chunks().to_batches()[0],
        "dataset": lambda: pd.dataset(table),
    }[form]()
    found = pyarrow.parquet.read_table(written(data)["path"]).to_pylist()
    cells = [row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"] for row in found]
    assert cells == [row["image"] for row in rows()]
    assert [row["label"] for row in found] == [row["label"] for row in rows()]


def test_rows_beside_a_place_leave_its_paths_alone(tiny_resnet: Path, tmp_path: Path) -> None:
    """A place's paths are relative to its own folder, those of rows to the working directory."""
    (tmp_path / "there").mkdir()
    here, there, lines = [], [], "path,label\n"
    for i, row in enumerate(rows()):
        Path(f"here{i}.png").write_bytes(row["image"])
        here.append({"image": f"here{i}.png", "label": row["label"]})
        (tmp_path / "there" / f"{i}.png").write_bytes(png(i * 9 + 1))
        lines += f"{i}.png,{row['label']}\n"
    there = tmp_path / "there" / "t.csv"
    there.write_text(lines)
    for data in ({"path": here, "test": str(there)}, {"path": str(there), "test": here}):
        assert orchestrator.plan(backbone=str(tiny_resnet), data=data).data.num_samples["test"] == 20
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=here, **{"data.test": str(there)})
    assert plan.data.num_samples["test"] == 20


def test_a_job_as_a_dict_may_hold_rows(tiny_resnet: Path) -> None:
    plan = orchestrator.plan({"backbone": str(tiny_resnet), "data": rows()})
    assert sum(plan.data.num_samples.values()) == 20
    plan = orchestrator.plan({"backbone": str(tiny_resnet), "data": {"path": rows()}}, data={"num_train": 8})
    assert plan.data.num_samples["train"] == 8
    Path("job.yaml").write_text(f"backbone: {tiny_resnet}\ndata: {{path: there, label_column: kind}}\n")
    renamed = [{"image": row["image"], "kind": row["label"]} for row in rows()]
    assert sum(orchestrator.plan("job.yaml", data=renamed).data.num_samples.values()) == 20


def test_a_wrong_backbone_is_refused_before_rows_are_read() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        raise AssertionError("read")
        yield {}

    for job in ({"data": endless()}, {"data": {"path": endless()}}):
        with pytest.raises(RefusedError, match=r"there is no directory ./nothing"):
            orchestrator.finetune({**job, "backbone": "./nothing"}, report=lambda _: None)
        with pytest.raises(RefusedError, match=r"there is no directory ./nothing"):
            orchestrator.plan(backbone="./nothing", **job)
    assert not Path("runs").exists()


def test_a_refused_job_leaves_no_rows_behind(tiny_resnet: Path) -> None:
    job: dict[str, Any] = {"backbone": str(tiny_resnet), "report": lambda _: None}
    same = [{**row, "label": "cat"} for row in rows()]
    with pytest.raises(DataError, match="the data holds one class only: 'cat'"):
        orchestrator.finetune(data=same, **job)
    assert not Path("runs").exists()
    kept = materialise_rows(same, Path("runs/.data"))  # by an earlier call, which may need it
    with pytest.raises(DataError):
        orchestrator.finetune(data=same, **job)
    assert Path(kept["path"]).is_file()  # type: ignore[index]


def test_faults_are_told_in_the_words_of_the_program(tiny_resnet: Path) -> None:
    broken = list(rows())
    broken[3] = {**broken[3], "image": b"nothing"}
    with pytest.raises(DataError) as caught:
        orchestrator.plan(backbone=str(tiny_resnet), data=broken)
    assert caught.value.message.startswith("row 4 of the data: is no image")
    assert "data.on_bad_sample" in caught.value.mend
    with pytest.raises(DataError, match=r"^row 4 of the test data: "):
        orchestrator.plan(backbone=str(tiny_resnet), data={"path": rows(), "test": broken})
    lists = [{**row, "label": [row["label"]]} for row in rows()]
    with pytest.raises(DataError, match=r"^row 1 of the data has a list of labels in 'label'"):
        orchestrator.plan(backbone=str(tiny_resnet), data=lists)
    with pytest.raises(DataError, match=r"^the data has no column 'label'"):
        orchestrator.plan(backbone=str(tiny_resnet), data=[{"image": row["image"]} for row in rows()])


def late_word() -> Iterator[dict[str, Any]]:
    for i in range(3000):
        yield {"text": f"text {i}", "label": i if i < 2500 else "last"}


def test_a_fraction_behind_whole_numbers_is_not_cut_off() -> None:
    numbers = [*({"text": "a", "y": 0} for _ in range(1024)), {"text": "b", "y": 1.5}]
    with pytest.raises(DataError, match="row 1025 of the data has a fraction in 'y'"):
        materialise_rows(numbers, Path("materialised"))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "the data holds no row"),
        ([("a", 1)], "row 1 of the data is a tuple"),
        ([{"text": "a", "label": object()}], "one of the rows 1 to 1 of the data cannot be written"),
        (late_word(), "one of the rows 2497 to 2560 of the data cannot be written"),
        ([*({"text": "a"} for _ in range(2000)), {"txt": "b"}], "row 2001 of the data has a key 'txt'"),
        (pandas_series(), "data is a Series"),
        (pa.array([1]), "data is a Int64Array"),
        (3, "data is a int"),
        (b"bytes", "data is a bytes"),
    ],
)
def test_rows_that_are_none(data: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        materialise_rows(data, Path("materialised"))
    assert problem in caught.value.message
    assert "give rows such as" in caught.value.mend
    assert not Path("materialised").exists() or not list(Path("materialised").iterdir())


@pytest.mark.parametrize(("key", "right"), [("train", "path"), ("dev", "validation")])
def test_rows_under_a_name_that_is_no_key(key: str, right: str) -> None:
    with pytest.raises(DataError, match=f"data has the key '{key}'") as caught:
        orchestrator.plan(backbone="./nothing", data={key: rows()})
    assert right in caught.value.mend


def test_a_plan_of_rows_leaves_nothing_behind(tiny_resnet: Path) -> None:
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=rows())
    assert sum(plan.data.num_samples.values()) == 20
    assert not list(Path.cwd().iterdir())


@pytest.mark.slow
def test_a_job_on_rows_goes_on_and_is_evaluated_on_rows(tiny_resnet: Path) -> None:
    job: dict[str, Any] = {"backbone": str(tiny_resnet), "training": {"epochs": 2}, "report": lambda _: None}
    job |= {"data.group_column": "speaker", "method": "head"}
    run = orchestrator.finetune(data=rows(80), **job)
    assert Path(run.plan.job.data.path).parent == Path("runs/.data").absolute()
    again: list[Event] = []
    assert orchestrator.finetune(data=list(rows(80)), **{**job, "report": again.append}).path == run.path
    assert any("finished before" in getattr(event, "text", "") for event in again)
    assert orchestrator.evaluate(run, rows(8))["num_samples"] == 8
    assert [one.name for one in Path("runs").iterdir() if not one.name.startswith(".")] == [run.name]


@pytest.mark.slow
def test_a_ray_data_set(tiny_resnet: Path) -> None:
    import ray
    import ray.data

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        found = written(ray.data.from_items(list(rows())))
    finally:
        ray.shutdown()
    table = pyarrow.parquet.read_table(found["path"]).to_pylist()
    assert sorted(row["image"] for row in table) == sorted(row["image"] for row in rows())
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=found)
    assert plan.classes == ("cat", "dog")
