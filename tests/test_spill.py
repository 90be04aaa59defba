"""Rows that a program holds: an iterable, a table in memory, a Ray or a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

import orchestrator
from orchestrator.errors import DataError
from orchestrator.spill import spill_data
from tests.test_data import png


def rows(num: int = 20) -> Iterator[dict[str, Any]]:
    for i in range(num):
        yield {"image": png(i * 9), "label": "cat" if i % 2 else "dog", "speaker": f"s{i // 4}"}


def of_pandas() -> Any:
    import pandas

    return pandas.DataFrame(list(rows()))


def of_datasets() -> Any:
    import datasets

    return datasets.Dataset.from_list(list(rows())).cast_column("image", datasets.Image())


FORMS: dict[str, Callable[[], Any]] = {
    "generator": rows,
    "list": lambda: list(rows()),
    "pyarrow": lambda: pa.Table.from_pylist(list(rows())),
    "pandas": of_pandas,
    "datasets": of_datasets,
}


def written(data: Any, folder: Path = Path("spilled")) -> dict[str, Any]:
    found = spill_data(data, folder)
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
    assert len(list(Path("spilled").iterdir())) == 2  # and nothing half written


def test_splits_and_settings_beside_the_rows() -> None:
    import datasets

    found = written({"path": rows(), "test": list(rows(4)), "label_column": "label", "validation": "here/val"})
    assert pyarrow.parquet.read_table(found["test"]).num_rows == 4
    assert found["label_column"] == "label"
    assert found["validation"] == "here/val"
    places = {"path": "photos", "test": "others"}
    assert spill_data(places, Path("spilled")) is places
    one = datasets.Dataset.from_list(list(rows(6)))
    both = written(datasets.DatasetDict({"train": one, "test": one.select(range(2))}))
    assert pyarrow.parquet.read_table(both["path"]).num_rows == 6
    assert pyarrow.parquet.read_table(both["test"]).num_rows == 2


def late_word() -> Iterator[dict[str, Any]]:
    for i in range(3000):
        yield {"text": f"text {i}", "label": i if i < 2500 else "last"}


def test_a_fraction_behind_whole_numbers_is_not_cut_off() -> None:
    numbers = [*({"text": "a", "y": 0} for _ in range(1024)), {"text": "b", "y": 1.5}]
    with pytest.raises(DataError, match="row 1025 of the data has a fraction in 'y'"):
        spill_data(numbers, Path("spilled"))


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "the data holds no row"),
        ([("a", 1)], "row 1 of the data is a tuple"),
        ([{"text": "a", "label": object()}], "one of the rows 1 to 1 of the data cannot be written"),
        (late_word(), "one of the rows 2497 to 2560 of the data cannot be written"),
        ([*({"text": "a"} for _ in range(2000)), {"txt": "b"}], "row 2001 of the data has a key 'txt'"),
        (3, "data is a int"),
        (b"bytes", "data is a bytes"),
    ],
)
def test_rows_that_are_none(data: Any, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        spill_data(data, Path("spilled"))
    assert problem in caught.value.message
    assert "give rows such as" in caught.value.mend
    assert not Path("spilled").exists() or not list(Path("spilled").iterdir())


def test_a_plan_of_rows_leaves_nothing_behind(tiny_resnet: Path) -> None:
    plan = orchestrator.plan(backbone=str(tiny_resnet), data=rows())
    assert sum(plan.data.num_samples.values()) == 20
    assert not list(Path.cwd().iterdir())


@pytest.mark.slow
def test_a_job_on_rows_goes_on_and_is_evaluated_on_rows(tiny_resnet: Path) -> None:
    job: dict[str, Any] = {"backbone": str(tiny_resnet), "training": {"epochs": 2}, "events": lambda _: None}
    job["data.group_column"] = "speaker"
    run = orchestrator.finetune(data=rows(80), **job)
    assert Path(run.plan.job.data.path).parent == Path("runs/.data").absolute()
    again: list[dict[str, Any]] = []
    assert orchestrator.finetune(data=list(rows(80)), **{**job, "events": again.append}).path == run.path
    assert again[-1]["text"] == "finished already"
    assert orchestrator.evaluate(run, rows(8))["num_samples"] == 8
    assert [one.name for one in Path("runs").iterdir() if one.name != ".data"] == [run.name]


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
