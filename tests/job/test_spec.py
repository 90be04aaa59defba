from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import orchestrator
from orchestrator.errors import JobError
from orchestrator.job import Data, Job, Training, make_job, parse_setting
from orchestrator.job.spec import Method, Scaling

GOOD = "backbone: a/b\ndata: photos\ntraining:\n  epochs: 3\n"


def refusal(*args: object, **fields: object) -> JobError:
    with pytest.raises(JobError) as caught:
        make_job(*args, **fields)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.reason == "usage"
    return caught.value


def test_the_same_job_from_python_yaml_and_dict(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(GOOD)
    from_yaml = make_job(file)
    assert from_yaml == make_job({"backbone": "a/b", "data": "photos", "training": {"epochs": 3}})
    assert from_yaml == make_job(backbone="a/b", data="photos", **{"training.epochs": 3})
    assert from_yaml == make_job(from_yaml)
    assert from_yaml.digest() == make_job(backbone="a/b", data={"path": "photos"}, training={"epochs": 3}).digest()


def test_a_job_written_as_yaml_is_the_same_job(tmp_path: Path) -> None:
    job = make_job(backbone="a/b", data="фото", method="full", **{"training.seed": 4, "data.num_train": 7})
    file = tmp_path / "job.yaml"
    file.write_text(job.to_yaml(), encoding="utf-8")
    assert make_job(file) == job


def test_a_setting_without_its_group_is_understood_where_one_group_has_it(tmp_path: Path) -> None:
    wanted = make_job(backbone="a/b", data={"path": "x", "label_column": "y"}, training={"epochs": 3, "batch_size": 8})
    flat = {"backbone": "a/b", "data": "x", "label_column": "y", "epochs": 3, "batch_size": 8}
    (tmp_path / "job.yaml").write_text("".join(f"{key}: {value}\n" for key, value in flat.items()))
    for job in (make_job(**flat), make_job(flat), make_job(tmp_path / "job.yaml")):
        assert job == wanted
        assert job.digest() == wanted.digest()
    assert make_job(label_column="y", **{key: flat[key] for key in ("backbone", "data")}).data == wanted.data
    assert make_job(tmp_path / "job.yaml", epochs=9).training.epochs == 9  # fields win over the file
    assert make_job(wanted, epochs=9).training == wanted.training.model_copy(update={"epochs": 9})
    for both in ({"training": {"epochs": 4}}, {"training.epochs": 4}):
        error = refusal(backbone="a/b", data="x", epochs=3, **both)
        assert (error.message, error.mend) == ("epochs is training.epochs, and both are set", "leave out epochs")
    assert "training.seed" in refusal(backbone="a/b", data="x", seed=3).mend


def test_of_a_key_like_no_other_all_keys_are_named() -> None:
    error = refusal(backbone="a/b", data="x", zzz=1)
    for name, model in (("data", Data), ("training", Training), ("scaling", Scaling)):
        assert all(f"{name}.{key}" in error.expected for key in model.model_fields)
    assert "method" in error.expected
    assert "orchestrator settings" in error.mend
    near = refusal(backbone="a/b", data="x", lerning_rate=1)  # and of a slip those that are like it alone
    assert near.expected == "one of training.learning_rate, training.head_learning_rate"
    assert near.mend == "did you mean training.learning_rate?"


def test_the_fewest_workers_are_no_more_than_all() -> None:
    error = refusal(backbone="a/b", data="x", num_workers=2, min_workers=3)
    assert error.message == "scaling: min_workers = 3 is more than num_workers = 2"
    scaling = make_job(backbone="a/b", data="x", num_workers=16, min_workers=2).scaling
    assert (scaling.is_elastic, scaling.fewest_workers) == (True, 2)
    fixed = make_job(backbone="a/b", data="x", num_workers=2).scaling
    assert (fixed.is_elastic, fixed.fewest_workers) == (False, 2)
    # Where it runs is no part of what is learnt: the run has the same name.
    digests = {make_job(backbone="a/b", data="x", num_workers=4, min_workers=n).digest() for n in (None, 1, 4)}
    assert len(digests) == 1


@pytest.mark.parametrize("key", ["workers", "num_workers", "scaling.workers"])
def test_workers_are_a_number_or_a_range(key: str, tmp_path: Path) -> None:
    job = {"backbone": "a/b", "data": "x"}
    asked = {"min": 2, "max": 16}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, key: asked}))
    for scaling in (make_job(**job, **{key: asked}).scaling, make_job(tmp_path / "job.yaml").scaling):
        assert (scaling.min_workers, scaling.num_workers) == (2, 16)
    assert make_job(**job, **{key: 3}).scaling.num_workers == 3
    for wrong, said in (
        ({"min": 2}, "{min: 2, max: 16}"), ({"min": 3, "max": 2}, "min_workers = 3 is more than"),
        ({"min": "a", "max": 2}, "scaling.min_workers = 'a'"), ({"min": 1, "max": 2, "most": 3}, "{min: 2, max: 16}"),
    ):  # fmt: skip
        assert said in refusal(**job, **{key: wrong}).message
    assert "both are set" in refusal(**job, **{key: 2, "scaling": {"num_workers": 3}}).message


def test_fields_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(GOOD + "  seed: 5\n")
    job = make_job(file, method="full", training={"epochs": 9}, data="elsewhere")
    assert (job.method, job.training.epochs, job.training.seed, job.data.path) == ("full", 9, 5, "elsewhere")


def test_where_a_run_is_put_does_not_change_its_digest() -> None:
    job = make_job(backbone="a/b", data="x")
    assert job.digest() == make_job(job, storage="elsewhere", name="mine").digest()
    assert job.digest() != make_job(job, method="full").digest()


def test_a_dotted_key_of_a_file_or_a_dict_stands_for_its_setting(tmp_path: Path) -> None:
    """As a mend names it, and Python takes it."""
    (tmp_path / "job.yaml").write_text(
        "backbone: a/b\ndata.path: x\ntraining.epochs: 3\ntraining: {batch_size: 4}\ndata: {seed: 5}\n"
    )
    for one in (tmp_path / "job.yaml", {"backbone": "a/b", "data": {"path": "x", "seed": 5}, "training.epochs": 3,
                                          "training": {"batch_size": 4}}):  # fmt: skip
        job = make_job(one)
        assert (job.training.epochs, job.training.batch_size, job.data.path, job.data.seed) == (3, 4, "x", 5)


@pytest.mark.parametrize(
    ("text", "message", "expected", "mend"),
    [
        (
            "backbone: a/b\ndata: x\nepoch: 3\n",
            "job.yaml:3: unknown key epoch",
            "one of training.epochs",
            "did you mean training.epochs?",
        ),
        (
            "backbone: a/b\ndata: x\nseed: 3\n",
            "job.yaml:3: seed may be data.seed or training.seed",
            "the group",
            "did you mean training.seed?",
        ),
        (
            "backbone: a/b\ndata: x\ntraining: {label_column: y}\n",
            "job.yaml:3: unknown key training.label_column",
            "epochs",
            "did you mean data.label_column?",
        ),
        (
            "backbone: a/b\ndata: x\nepochs: 3\ntraining: {epochs: 4}\n",
            "job.yaml:3: epochs is training.epochs, and both are set",
            "",
            "leave out epochs",
        ),
        ("backbone: a/b\ndata: x\nepochs: many\n", "job.yaml:3: training.epochs = 'many'", "", ""),
        (
            "backbone: a/b\ndata: x\ntraining:\n  epoch: 3\n",
            "job.yaml:4: unknown key training.epoch",
            "epochs",
            "epochs?",
        ),
        (
            "backbone: a/b\ndata: x\ntraining:\n  epochs: many\n",
            "job.yaml:4: training.epochs = 'many'",
            "",
            "",
        ),
        (
            "backbone: a/b\ndata: x\nmethod: magic\n",
            "job.yaml:3: method = 'magic': input should be 'auto', 'head'",
            "",
            "",
        ),
        ("backbon: a/b\ndata: x\n", "job.yaml:1: unknown key backbon", "one of backbone", "backbone?"),
        (
            "backbone: a/b\ndata: x\nepocs: 3\nnmae: x\ntraining: {schedul: cosine}\n",
            "job.yaml: unknown keys training.schedul (line 5), epocs (line 3), nmae (line 4)",
            "training.epochs, name",
            "did you mean schedule?; epocs (line 3): did you mean training.epochs?; nmae (line 4): did you mean name?",
        ),
        ("backbone: a/b\ndata: x\ntrainig: {epochs: 3}\n", "unknown key trainig", "training", "did you mean training?"),
        ("backbone: a/b\ndatas: x\n", "job.yaml:2: unknown key datas", "data", "did you mean data?"),
        (
            "backbone: a/b\ndata: x\nqqqq: 1\n",
            "job.yaml:3: unknown key qqqq",
            "one of modality, backbone, data, task, method, training, scaling",
            "take it out (orchestrator settings lists those that there are)",
        ),
        (
            "backbone: a/b\ndata: x\ntraining.epochs: 3\ntraining: {epochs: 4}\n",
            "job.yaml:4: training.epochs stands here, and epochs below training as well",
            "",
            "take one of the two out",
        ),
        ("backbone: a/b\ndata: x\nname: 2024\n", "job.yaml:3: name = 2024", "", ""),
        ("data: x\n", "backbone is missing", "org/name", "give it: backbone=..., or --backbone; in a job file"),
        ("backbone: a/b\ndata: x\ntraining: 3\n", "job.yaml:3: training = 3: is a group of settings", "", ""),
        ("backbone: a/b\nbackbone: c/d\ndata: x\n", "job.yaml:2: backbone stands here a second time", "", ""),
        ("backbone: [a\n", "job.yaml:2:", "a YAML file", ""),
        ("name: 2024-13-45\n", "job.yaml: not readable as YAML: month", "a YAML file", ""),
        ("&a [*a]\n", "holds no settings", "", ""),
        ("- a\n", "holds no settings", "", ""),
        ("", "holds no settings", "", ""),
    ],
)
def test_a_faulty_file_is_refused_with_its_place(
    tmp_path: Path, text: str, message: str, expected: str, mend: str
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    error = refusal(tmp_path / "job.yaml")
    assert message in error.message
    assert expected in error.expected
    assert mend in error.mend


def test_paths_are_texts_and_values_without_a_name_are_refused() -> None:
    """Path("bb") was refused as a backbone, and taken as data."""
    for job in (make_job(backbone=Path("a/b"), data=Path("x"), storage=Path("r")),
                make_job({"backbone": Path("a/b"), "data": Path("x"), "storage": Path("r")})):  # fmt: skip
        assert (job.backbone, job.data.path, job.storage) == ("a/b", "x", "r")
    for call in (orchestrator.finetune, orchestrator.pretrain):
        with pytest.raises(JobError, match="2 values stand without a name") as refused:
            call("bb/bert", "sent.csv")
        assert refused.value.mend == "name them: backbone=..., data=..."


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no job file" in refusal(tmp_path / "none.yaml").message
    assert "is a directory" in refusal(tmp_path).message
    assert refusal(tmp_path).mend == f"if it is the data: data={str(tmp_path)!r}, or --data {tmp_path}"
    (tmp_path / "table.csv").write_text("path,label\na,b\n")
    assert refusal(tmp_path / "table.csv").mend.endswith(f"or --data {tmp_path}/table.csv")
    (tmp_path / "config.json").touch()
    assert refusal(tmp_path).mend == f"if it is the backbone: backbone={str(tmp_path)!r}, or --backbone {tmp_path}"
    (tmp_path / "job.yaml").touch()
    assert refusal(tmp_path).mend.startswith(f"to go on with that run: {tmp_path}/job.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(tmp_path / "bytes.yaml").message
    assert "from a int" in refusal(3).message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training.learning_rate": -1}, "training.learning_rate = -1"),
        ({"data.validation_fraction": 0.6, "data.test_fraction": 0.5}, "leave nothing to train on"),
        ({"data.separator": "ab"}, "data.separator = 'ab': has to be one character"),
        ({"name": "../up"}, "without slashes"),
        ({"training.learning_rate": float("inf")}, "finite number"),
        ({"training.epochs": True}, "true and false mean nothing here"),
        ({"storage": "s3://me:secret@bucket/runs"}, "holds a password"),
        ({"storage": "~nobody-of-this-name/runs"}, "there is no user of this name"),
        ({"backbone.path": 3}, "backbone is no group"),
        ({"scaling.num_workers": 0}, "scaling.num_workers = 0"),
    ],
)
def test_impossible_values(fields: dict[str, object], message: str) -> None:
    assert message in refusal({"backbone": "a/b", "data": "x"}, **fields).message


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"method": "heads"}, "did you mean head?"),
        ({"task": "Multilabel"}, "did you mean multi-label?"),
        ({"data.on_bad_sample": "skipp"}, "did you mean skip?"),
        ({"training.optimizer": "adam"}, "did you mean adamw?"),
        ({"method": "xyz"}, "choose one of these"),
        ({"method": 3}, "choose one of these"),
        ({"data.validation_fraction": 0.6, "data.test_fraction": 0.5}, "lower one: their sum is below 1"),
    ],
)
def test_a_misspelt_value(fields: dict[str, object], mend: str) -> None:
    assert refusal({"backbone": "a/b", "data": "x"}, **fields).mend == mend


def test_a_setting_is_read_as_yaml() -> None:
    assert parse_setting("training.epochs=3") == ("training.epochs", 3)
    assert parse_setting("data.group_column=a=b") == ("data.group_column", "a=b")
    assert parse_setting("training.clip_norm=null") == ("training.clip_norm", None)
    with pytest.raises(JobError, match="sets nothing"):
        parse_setting("training.epochs")


def test_a_job_is_frozen() -> None:
    job = make_job(backbone="a/b", data="x")
    with pytest.raises(ValueError, match="frozen"):
        job.method = "full"  # type: ignore[misc]
    assert isinstance(job, Job)


@pytest.mark.parametrize(("text", "value"), [("a=|", "|"), ("a=>", ">"), ("a=;", ";"), ("a=''", ""), ("a=3", 3)])
def test_a_setting_is_what_was_typed(text: str, value: object) -> None:
    assert parse_setting(text) == ("a", value)


# --- what a job.yaml holds ---


def written(tmp_path: Path, **fields: Any) -> tuple[Job, Job]:
    """A job, and the same one out of its YAML file."""
    job = make_job(backbone="a/b", **{"data": "x", **fields})
    (tmp_path / "job.yaml").write_text(job.to_yaml(), encoding="utf-8")
    return job, make_job(tmp_path / "job.yaml")


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\r", "\ufeff"])
def test_breaks_of_lines_that_are_no_newline_are_kept(tmp_path: Path, mark: str) -> None:
    job, again = written(tmp_path, name=f"a{mark}b", data=f"{mark}photos")
    assert again == job
    assert again.data.path == f"{mark}photos"


def test_settings_are_as_the_file_and_the_plan_hold_them(tmp_path: Path) -> None:
    job, again = written(
        tmp_path, settings={"size": (64, 64), "vocabulary": Path("words.txt"), "since": date(2024, 1, 2)}
    )
    assert again == job
    assert job.settings == {"size": [64, 64], "vocabulary": "words.txt", "since": "2024-01-02"}
    job, again = written(tmp_path, settings={"a": {"b": 1}, "a.b": 2})
    assert again == job
    for value in (float("nan"), float("inf"), object(), b"\xff"):
        assert refusal({"backbone": "a/b", "data": "x"}, settings={"x": value}).message.startswith("settings: ")


def test_a_file_uri_is_the_path_however_often_it_says_so(tmp_path: Path) -> None:
    job, again = written(tmp_path, data="file://file://localhost/photos")
    assert again == job
    assert job.data.path == "/photos"


# --- any job ---

TEXTS = st.text(max_size=20) | st.sampled_from(
    ["null", "~", "yes", "1e3", "0o7", "2024-01-01", "1:30", "<<", "=", "*a", "&a", "- a", "a: b", "a #b", "|", " a ",
     "\t", "a\x85b", "a\u2028b", "\ufeff", "a\r\nb", "\x00", "\x7f", "猫", "file://file://a", "x" * 90 + "\n y" * 9,
     "a.b"]
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**70), 2**70)
SETTINGS = st.dictionaries(
    TEXTS,
    st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


def part(model: type[BaseModel], **known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the fields of a part of a job, each with any value that it may have."""
    fields = {name: known[name] if name in known else values(field) for name, field in model.model_fields.items()}
    required = {name: fields.pop(name) for name, field in model.model_fields.items() if field.is_required()}
    return st.fixed_dictionaries(required, optional=fields)


def values(field: FieldInfo) -> st.SearchStrategy[Any]:
    """Any value of the field's type within its bounds."""
    bound = {
        name: getattr(one, name) for one in field.metadata for name in ("ge", "gt", "le", "lt") if hasattr(one, name)
    }
    kinds = {
        "Literal": st.from_type(field.annotation),
        "int": st.integers(bound.get("ge"), bound.get("le")),
        "float": st.floats(
            bound.get("ge", bound.get("gt", 0)),
            bound.get("lt", bound.get("le", 1e300)),
            exclude_min="gt" in bound,
            exclude_max="lt" in bound,
        ),
        "str": TEXTS.filter(bool),
        "tuple": st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        "None": st.none(),
    }
    named = [kind for kind in kinds if re.search(rf"\b{kind}\b", str(field.annotation))]
    return st.one_of([kinds[kind] for kind in named if named[0] != "Literal" or kind == "Literal"])


def in_order(scaling: dict[str, Any]) -> dict[str, Any]:
    """With the numbers of workers, where both are given, in their order."""
    few, all_of_them = scaling.get("min_workers"), scaling.get("num_workers", 1)
    return scaling if few is None else {**scaling, "min_workers": min(few, all_of_them)}


JOBS = part(
    Job,
    method=st.sampled_from(get_args(Method)),
    data=part(
        Data,
        validation_fraction=st.floats(0, 0.49),
        test_fraction=st.floats(0, 0.49),
        separator=st.sampled_from(["tab", ";", " ", "ß"]),
        encoding=st.sampled_from(["cp1252", "utf-16", "UTF8"]),
    ),
    training=part(Training),
    scaling=part(Scaling).map(in_order),
    settings=SETTINGS,
    storage=TEXTS.filter(lambda text: "://" not in text and not text.startswith("~")),
    feature_store=st.none() | st.just("s3://bucket/features"),
    name=st.none() | TEXTS.filter(lambda text: text.strip() and not set(text) & set("/\\") and text not in (".", "..")),
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(fields=JOBS)
def test_any_job_written_as_yaml_is_the_same_job(
    fields: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    job = make_job(fields)
    file = tmp_path_factory.mktemp("job") / "job.yaml"
    file.write_text(job.to_yaml(), encoding="utf-8")
    again = make_job(file)
    assert again == job
    assert again.digest() == job.digest()
    assert again.to_yaml() == job.to_yaml()
