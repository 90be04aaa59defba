"""check_modality: what passes, and each fault that it names, shown on a plugin that has it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import ContractError, OrchestratorError
from orchestrator.job.plans import BackboneRow
from orchestrator.modality import registry
from orchestrator.modality.contract import BackboneRules, Modality, SampleField, Task
from orchestrator.testing import check_modality, declaration
from tests.conftest import REPOSITORY
from tests.modality.test_registry import install
from tests.tiny import make_bert, make_wav2vec2

sys.path.insert(0, str(REPOSITORY / "examples" / "third_party"))
try:
    import orchestrator_sensor

    from tests import broken_sensor as broken
finally:
    sys.path.pop(0)

SENSOR: Modality = orchestrator_sensor.modality
BACKBONE = {"model_type": "sensor-cnn", "channels": 3, "width": 4}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process that the check starts finds the modules of these plugins."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "third_party"))
    monkeypatch.syspath_prepend(str(REPOSITORY))


def caught(
    modality: Modality, backbone: Mapping[str, Any] | Path = BACKBONE, installed: bool = False, **more: Any
) -> ContractError:
    with pytest.raises(ContractError) as error:
        check_modality(modality, backbone, **more)
    assert error.value.expected or error.value.mend
    assert isinstance(error.value, OrchestratorError)
    assert installed or modality.name == "image" or modality.name not in registry.names()
    return error.value


def with_rules(**accepts: str) -> BackboneRules:
    rows = {key: BackboneRow(head=(head,)) for key, head in accepts.items()}
    return BackboneRules(generated_from="nothing", accepts={**SENSOR.rules.accepts, **rows})


# --- what passes ---


@pytest.mark.filterwarnings("error")
def test_the_example_passes_and_leaves_nothing_behind() -> None:
    check_modality(SENSOR, BACKBONE)
    assert "sensor" not in registry.names()
    assert not list(Path.cwd().iterdir())


def test_images_pass(tiny_resnet: Path) -> None:
    check_modality(registry.get("image"), tiny_resnet)


def test_audio_passes(tmp_path: Path) -> None:
    check_modality(registry.get("audio"), make_wav2vec2(tmp_path / "backbone"))


def test_text_passes_by_both_heads(tmp_path: Path) -> None:
    backbone = make_bert(tmp_path / "backbone")
    for head in ("native", "pooled"):
        check_modality(registry.get("text"), backbone, settings={"head": head})


# --- each fault ---


def test_a_name_that_another_distribution_has() -> None:
    error = caught(dataclasses.replace(SENSOR, name="image"))
    assert error.field == "name"
    assert "'image' is taken by orchestrator (orchestrator_image:modality)" in error.message


def test_a_name_that_two_distributions_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for distribution in ("one-plugin", "other-plugin"):
        install(tmp_path, distribution, "sensor", "from orchestrator_sensor import modality")
    monkeypatch.syspath_prepend(str(tmp_path))
    error = caught(SENSOR, installed=True)
    assert error.field == "name"
    assert "2 distributions claim 'sensor': one-plugin (one_plugin:modality) and other-plugin" in error.message


def test_the_own_entry_point_is_no_collision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "one-plugin", "sensor", "from orchestrator_sensor import modality")
    monkeypatch.syspath_prepend(str(tmp_path))
    error = caught(dataclasses.replace(SENSOR, toy=None), installed=True)
    assert error.field == "toy"
    assert "is taken by one-plugin" in caught(dataclasses.replace(SENSOR, title="other"), installed=True).message
    monkeypatch.setattr(registry, "_loaded", {})
    check_modality(SENSOR, BACKBONE)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        # what is declared
        ({"name": "Not A Name"}, "declaration", "expected: a lower-case identifier"),
        ({"settings": broken.Lax}, "declaration", "unknown keys in silence"),
        ({"settings": broken.Dropping}, "settings", "takes the unknown key"),
        ({"toy": None}, "toy", "a modality without toy samples cannot be checked"),
        ({"build": None}, "build", "nothing can be trained"),
        ({"tasks": (Task(name="telling", title="?"),)}, "tasks", "names 'telling'"),
        ({"sample": (dataclasses.replace(SENSOR.sample[0], suffixes=()),)}, "sample", "with the suffixes []"),
        # the rules
        ({"rules": with_rules(resnet="classifier")}, "rules", "accept 'resnet' (transformers), of the modality image"),
        ({"rules": with_rules(wav2vec2="classifier")}, "rules", "accept 'wav2vec2'"),
        ({"rules": with_rules(bert="classifier")}, "rules", "accept 'bert'"),
        ({"rules": dataclasses.replace(SENSOR.rules, accepts=broken.Everything())}, "rules", "a type that nobody"),
        ({"rules": dataclasses.replace(SENSOR.rules, timm={"resnet50": BackboneRow(head=("fc",))})}, "rules", "(timm)"),
        # the toys
        ({"toy": broken.one_class}, "toy", "gives the classes {'slow': 32}"),
        ({"toy": broken.at_random}, "toy", "other samples when it is called again"),
        ({"toy": broken.too_few}, "toy", "toy(32) gives 3 samples"),
        ({"toy": broken.not_apart}, "toy", "one and the same sample"),
        ({"toy": broken.numbers_as_labels}, "toy", "gives the label 0"),
        ({"toy": broken.undeclared_field}, "sample", "has the field 'weather', which is not declared"),
        ({"toy": broken.without_field}, "sample", "lacks the field 'sensor'"),
        ({"toy": broken.not_bytes}, "sample", "is a list"),
        # decode, measure, fit
        ({"decode": broken.decode_unguarded}, "decode", "raises"),
        ({"decode": broken.decode_saying_nothing}, "decode", "says nothing about"),
        ({"measure": lambda *_: {}}, "measure", "cannot cross to another process by pickle"),
        ({"measure": broken.measure_list}, "measure", "'shape': (3, 100) (tuple)"),
        ({"measure": broken.measure_infinite}, "measure", "'loudest': inf"),
        ({"measure": broken.measure_numpy}, "measure", "int64"),
        ({"fit": broken.fit_changing}, "fit", "changes its arguments"),
        ({"fit": broken.fit_counting}, "fit", "something else the second time"),
        ({"fit": broken.fit_tuple}, "fit", "something else when it comes back from JSON"),
        ({"fit": broken.fit_object}, "fit", "is no JSON"),
        ({"fit": broken.fit_dict}, "fit", "gives a dict"),
        ({"fit": broken.fit_refusing}, "fit", "with the toys' profile raises RefusedError"),
        ({"fit": broken.fit_with_torch}, "fit", "imports torch"),
        ({"decode": broken.decode_with_torch}, "decode", "imports torch"),
        # batch
        ({"batch": broken.batch_of_more_keys}, "batch", "gives 'weather', which the network's forward does not take"),
        ({"batch": broken.batch_double}, "batch", "'input' is float64"),
        ({"batch": broken.batch_whole_numbers}, "batch", "expected: float32, as the field 'sensor' is declared"),
        ({"batch": broken.batch_flat}, "batch", "expected: [batch, channels, time]"),
        ({"batch": broken.batch_transposed}, "batch", "the batch comes first"),
        ({"batch": broken.batch_lists}, "batch", "'input' a list"),
        ({"batch": broken.batch_at_random}, "batch", "something else the second time"),
        ({"batch": broken.batch_of_numpy}, "batch", "something else with the same seed of torch"),
        ({"settings": broken.Shaken, "fit": broken.fit_shaken, "batch": broken.batch_shaken,
          "augments": {"shake": True}}, "batch", "something else with the same seed of torch"),
        ({"fit": broken.fit_silent}, "adaptations", "batch makes [3, 128] of a sample of [3, 100]"),
        ({"batch": broken.batch_not_finite}, "batch", "'input' is not finite"),
        ({"batch": broken.batch_blind}, "batch", "the same logits"),
        ({"sample": (dataclasses.replace(SENSOR.sample[0], shape=(7, "time")),)}, "batch", "[batch, 7, time]"),
        ({"mixes": {"roll": broken.mix_of_more_keys}}, "mixes", "gives 'input' float32 [8, 3, 128], 'share' float32"),
        ({"mixes": {"roll": broken.mix_without_labels}}, "mixes", "targets that are no shares"),
        ({"mixes": {"roll": broken.mix_in_place}}, "mixes", "changes the batch that it is given"),
        ({"mixes": {"roll": broken.mix_raising}}, "mixes", "mixes['roll'] raises ValueError"),
        ({"augments": {"shake": True}}, "augments", "raises JobError"),
        ({"augments": {"steps": 64}}, "augments", "Fit.augmented is False"),
        # the network
        ({"build": broken.build_nothing}, "build", "gives a NoneType"),
        ({"build": broken.build_head_of_no_name}, "build", "the head 'last' is no module"),
        ({"build": broken.build_wide}, "build", "logits float32 [8, 9]"),
        ({"build": broken.build_infinite}, "build", "the loss is nan"),
        ({"build": broken.build_for_float32}, "build", "in bfloat16, which is what a GPU trains in"),
        ({"build": broken.build_still}, "build", "a step changes nothing: no gradient reaches the head"),
        ({"build": broken.build_detached}, "build", "the backward pass raises"),
        ({"build": broken.build_thawed}, "build", "steps with method head change"),
        ({"build": broken.build_saving_nothing}, "build", "weights='trained'"),
        ({"build": broken.build_saving_noise}, "build", "other logits than the one in memory"),
        ({"build": broken.build_saving_its_own}, "build", "other logits than the one in memory"),
        ({"build": broken.build_saving_the_old_way}, "build", "save(folder, state_dict)"),
    ],
)  # fmt: skip
def test_a_fault_is_named(change: dict[str, Any], field: str, words: str) -> None:
    error = caught(dataclasses.replace(SENSOR, **change))
    assert error.field == field, str(error)
    assert words in str(error)


@pytest.mark.parametrize("field", ["decode", "measure", "fit", "build", "batch", "toy"])
def test_what_is_left_out_is_told_with_its_signature(field: str) -> None:
    error = caught(dataclasses.replace(SENSOR, **{field: None}))
    assert error.field == field
    module, _, name = error.mend.split()[2].rpartition(".")
    assert callable(getattr(sys.modules[module], name))


def test_a_top_module_that_imports_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (REPOSITORY / "examples" / "third_party" / "orchestrator_sensor.py").read_text()
    (tmp_path / "heavy_sensor.py").write_text("import torch\n" + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import heavy_sensor  # type: ignore[import-not-found]

    error = caught(heavy_sensor.modality)
    assert error.field == "the top module"
    assert "importing heavy_sensor imports torch" in error.message


COUNTED = """
import os, sys
with open({count!r}, "a") as file:
    print(os.getpid(), file=file)
if sum(1 for _ in open({count!r})) > 3:
    os._exit(1)  # without the guard each import starts the next one
"""


def test_a_check_at_the_top_of_the_plugin_itself_starts_no_chain_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (REPOSITORY / "examples" / "third_party" / "orchestrator_sensor.py").read_text()
    count = tmp_path / "imports"
    called = f"\nfrom orchestrator.testing import check_modality\ncheck_modality(modality, {BACKBONE})\n"
    (tmp_path / "eager_sensor.py").write_text(COUNTED.format(count=str(count)) + code + called)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ContractError, match="calls check_modality when it is imported") as error:
        importlib.import_module("eager_sensor")
    assert error.value.field == "the top module"
    assert "put the call into a test" in error.value.mend
    assert len(count.read_text().split()) == 2  # here, and in the one process of the check


def test_a_plugin_in_the_script_that_is_run_is_told_where_to_call_the_check(tmp_path: Path) -> None:
    code = (REPOSITORY / "examples" / "third_party" / "orchestrator_sensor.py").read_text()
    called = f"\nfrom orchestrator.testing import check_modality\ncheck_modality(modality, {BACKBONE})\n"
    (tmp_path / "script.py").write_text(code + called)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert "call check_modality in another file" in done.stderr.splitlines()[-1]


def test_a_plugin_that_waits_in_another_process_is_given_up_and_what_it_started_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (REPOSITORY / "examples" / "third_party" / "orchestrator_sensor.py").read_text()
    pid = tmp_path / "pid"
    waits = f"""
import os, subprocess, time
if "ORCHESTRATOR_CHECK_MODALITY" in os.environ:
    child = subprocess.Popen(["sleep", "600"])
    with open({str(pid)!r}, "w") as file:
        file.write(str(child.pid))
    time.sleep(600)
"""
    (tmp_path / "waiting_sensor.py").write_text(waits + code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(declaration, "LONGEST_S", 5.0)
    error = caught(importlib.import_module("waiting_sensor").modality)
    assert "within 5 s in another process" in error.message
    for _ in range(100):
        if not _runs(pid.read_text()):
            break
        time.sleep(0.1)
    assert not _runs(pid.read_text())


def _runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_backbones_that_are_shared_on_purpose() -> None:
    rules = with_rules(resnet="classifier")
    error = caught(dataclasses.replace(SENSOR, rules=rules, decode=broken.decode_unguarded), shares=["image"])
    assert error.field == "decode"  # and so the rules have passed


def test_every_task_that_is_declared_is_trained_for() -> None:
    tasks = tuple(Task(name=name, title=name) for name in ("single-label", "multi-label", "regression"))
    error = caught(dataclasses.replace(SENSOR, tasks=tasks, build=broken.build_wide_for_numbers))
    assert error.field == "build"
    assert "for the task regression, the network gives logits float32 [8, 9]" in str(error)


def test_a_network_for_float32_alone_says_so() -> None:
    row = BackboneRow(head=("8",), fp32_only=True)
    rules = dataclasses.replace(SENSOR.rules, accepts={"sensor-cnn": row})
    check_modality(dataclasses.replace(SENSOR, build=broken.build_for_float32, rules=rules), BACKBONE)


def test_two_fields_and_an_optional_one() -> None:
    more = SampleField(name="place", kind="text", dtype="int64", shape=(), unit="")
    assert "lacks the field 'place'" in caught(dataclasses.replace(SENSOR, sample=(*SENSOR.sample, more))).message


def test_settings_that_cannot_be_left_out() -> None:
    needy = dataclasses.replace(SENSOR, settings=broken.Needy)
    assert caught(needy).field == "settings"
    check_modality(needy, BACKBONE, settings={"steps": 64})


def test_a_backbone_of_another_kind(tiny_resnet: Path) -> None:
    error = caught(SENSOR, tiny_resnet)
    assert (error.field, "RefusedError" in error.message) == ("rules", True)


def test_what_was_registered_stays_so() -> None:
    registry.register(SENSOR)
    try:
        with pytest.raises(ContractError):
            check_modality(dataclasses.replace(SENSOR, batch=broken.batch_flat), BACKBONE)
        assert registry.get("sensor") is SENSOR
    finally:
        registry.unregister("sensor")
