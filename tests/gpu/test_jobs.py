"""Whole jobs on a GPU as a newcomer starts them, in the precision that it has: each method, stopped and gone on with;
a search, a ranking, and Ray's workers and extractors that share it.

    python -m pytest -m gpu -rs tests
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import orchestrator
from orchestrator.errors import InterruptedRunError
from tests.devices import on_a_gpu
from tests.gpu.test_parity import texts as texts
from tests.tiny import make_bert
from tests.training.test_loop import at_call
from tests.whole.test_train import same, silent, weights_of

pytestmark = on_a_gpu
SCALING = {"device": "gpu", "threads_per_worker": 2}
HALF = {"device": "gpu", "threads_per_worker": 2, "gpus_per_worker": 0.5}


def train(backbone: Path, data: Path, **fields: Any) -> orchestrator.Run:
    training = {"epochs": 4, "batch_size": 32, "deterministic": True, **fields.pop("training", {})}
    job = {"scaling": SCALING, "report": silent, **fields}
    return orchestrator.finetune(backbone=str(backbone), data=str(data), training=training, **job)


@pytest.mark.parametrize("method", ["auto", "head", "lp-ft", "full", "scratch", "ema"])
def test_a_method_stopped_and_gone_on_with_ends_with_the_same_weights(
    method: str, tiny_resnet: Path, flat_digits: Path
) -> None:
    fields: dict[str, Any] = {"method": "full" if method == "ema" else method}
    fields["training"] = {"checkpoint_every_steps": 5, **({"ema": 0.9} if method == "ema" else {})}
    if method == "auto":
        del fields["training"]
    whole = train(tiny_resnet, flat_digits, name="whole", **fields)
    assert math.isfinite(whole.results["validation"]["loss"])
    for number in (3, 12):
        with pytest.raises(InterruptedRunError):
            train(tiny_resnet, flat_digits, name=f"cut-{number}", stop=at_call(number), **fields)
        cut = train(tiny_resnet, flat_digits, name=f"cut-{number}", **fields)
        assert same(weights_of(cut), weights_of(whole)), number


def test_lora_stopped_and_gone_on_with(tmp_path: Path, texts: Path) -> None:
    pytest.importorskip("peft")
    bert = make_bert(tmp_path / "bert")
    fields: dict[str, Any] = {"modality": "text", "method": "lora", "settings": {"head": "native"}}
    fields["training"] = {"checkpoint_every_steps": 2, "batch_size": 8}
    whole = train(bert, texts, name="whole", **fields)
    with pytest.raises(InterruptedRunError):
        train(bert, texts, name="cut", stop=at_call(5), **fields)
    assert same(weights_of(train(bert, texts, name="cut", **fields)), weights_of(whole))


def test_what_was_trained_there_is_served_and_gone_on_with_on_a_cpu(tiny_resnet: Path, flat_digits: Path) -> None:
    run = train(tiny_resnet, flat_digits, method="full", name="there")
    files = sorted(flat_digits.glob("*/*.png"))[:20]
    with torch.no_grad():
        predicted = orchestrator.predict(run, files)
    assert {one.label for one in predicted} <= set(run.plan.classes)
    assert orchestrator.evaluate(run, str(flat_digits))["loss"] < math.inf
    with pytest.raises(InterruptedRunError):
        train(tiny_resnet, flat_digits, method="full", name="moved", stop=at_call(12))
    here = train(tiny_resnet, flat_digits, method="full", name="moved", scaling={**SCALING, "device": "cpu"})
    assert len(here.metrics) == 4


def test_a_search_over_methods_and_seeds(tiny_resnet: Path, flat_digits: Path) -> None:
    base = {"backbone": str(tiny_resnet), "data": str(flat_digits), "epochs": 2, "scaling": SCALING}
    space = {"method": {"grid": ["head", "full"]}, "training.seed": {"grid": [0, 1]}}
    result = orchestrator.search(base, space, report=silent)
    assert [one.state for one in result.trials] == ["finished"] * 4, [one.error for one in result.trials]
    assert result.best_run is not None


def test_a_ranking(tiny_resnet: Path, tiny_vit: Path, flat_digits: Path) -> None:
    table = orchestrator.rank([str(tiny_resnet), str(tiny_vit)], data=str(flat_digits), report=silent)
    assert all(row.score is not None and row.full_minutes is not None for row in table.rows)


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    import ray

    ray.shutdown()  # that of a search before
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_cluster")
@pytest.mark.parametrize("method", ["full", "head"])
def test_workers_that_share_it_learn_what_one_does(method: str, tiny_resnet: Path, flat_digits: Path) -> None:
    fields: dict[str, Any] = {"method": method, "training": {"precision": "fp32", "num_microbatches": 2}}
    alone = train(tiny_resnet, flat_digits, name="alone", **fields)
    one = train(tiny_resnet, flat_digits, name="one", **{**fields, "scaling": {**SCALING, "address": "auto"}})
    two = {**HALF, "address": "auto", "num_workers": 2}
    both = train(tiny_resnet, flat_digits, name="two", **{**fields, "scaling": two})
    assert same(weights_of(one), weights_of(alone))
    for name, tensor in weights_of(alone).items():
        assert torch.allclose(weights_of(both)[name], tensor, atol=0.02), name
    assert abs(both.results["validation"]["loss"] - alone.results["validation"]["loss"]) < 0.02


@pytest.mark.usefixtures("_cluster")
def test_an_extractor_beside_the_worker(tiny_resnet: Path, flat_digits: Path) -> None:
    alone = train(tiny_resnet, flat_digits, name="alone", method="head", storage="one")
    scaling = {**HALF, "address": "auto", "num_extractors": 1}
    run = train(tiny_resnet, flat_digits, name="beside", method="head", storage="other", scaling=scaling)
    assert run.lineage["num_computed"] == alone.lineage["num_computed"]
    assert abs(run.results["validation"]["loss"] - alone.results["validation"]["loss"]) < 0.02
