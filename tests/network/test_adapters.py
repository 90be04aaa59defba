"""Method lora: adapters on a frozen body, on real weights where a package ships them, and what becomes of them."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import orchestrator
from orchestrator.errors import InterruptedRunError, MissingExtraError, RefusedError, WeightsError
from orchestrator.job import Adapter, Plan
from orchestrator.modality import registry
from orchestrator.network import Network, adapt, adapted_modules, merge
from tests.conftest import REPOSITORY
from tests.tiny import SENTENCES, make_bert, make_language_model
from tests.toys import write_toys
from tests.training.test_loop import at_call
from tests.whole.test_train import same, silent, weights_of

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, its trained weights."""
    make = runpy.run_path(str(REPOSITORY / "examples" / "glosses" / "make_backbone.py"))["make_backbone"]
    return Path(make(tmp_path_factory.mktemp("minilm")))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toys(tmp_path_factory.mktemp("texts"), "text")


def job_of(backbone: Path, data: Path, **fields: Any) -> dict[str, Any]:
    return {
        "modality": "text", "method": "lora", "backbone": str(backbone), "data": str(data), "report": silent,
        "training": {"epochs": 2, "batch_size": 4, "checkpoint_every_steps": 3}, "scaling": {"threads_per_worker": 1},
        "settings": {"head": "native"}, **fields,
    }  # fmt: skip


def built(plan: Plan, directory: Path) -> Network:
    build = registry.get(plan.job.modality).build
    assert build is not None
    network: Network = build(plan, directory)
    network.module.eval()
    return network


def newest(run: orchestrator.Run, name: str) -> dict[str, torch.Tensor]:
    folder = sorted((run.path / "checkpoints").glob("step-*"))[-1]
    return load_file(next(folder.rglob(f"{name}.safetensors")))


@pytest.fixture(scope="module")
def run(minilm: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> orchestrator.Run:
    """On real weights."""
    return orchestrator.finetune(**job_of(minilm, texts, storage=str(tmp_path_factory.mktemp("runs"))))


@pytest.mark.slow
def test_the_merged_export_is_the_adapted_network(run: orchestrator.Run, minilm: Path) -> None:
    """Through transformers' pipeline, in a process that has neither this package nor peft."""
    best = newest(run, "best")
    assert all(".lora_" in name or name.startswith("classifier") for name in best)
    network = built(run.plan, minilm)
    adapter = run.plan.recipe.adapter
    assert adapter is not None
    adapt(network, adapter, 0)
    tensors = dict(network.module.named_parameters())
    with torch.no_grad():
        for name, value in best.items():
            tensors[name].copy_(value)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    with torch.no_grad():
        adapted = network.logits(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    program = (
        "import sys, json\n"
        "sys.modules['orchestrator'] = sys.modules['orchestrator_text'] = sys.modules['peft'] = None\n"
        "from transformers import pipeline\n"
        "serve = pipeline('text-classification', model=sys.argv[1], top_k=None, function_to_apply='none')\n"
        "print(json.dumps([{one['label']: one['score'] for one in each} for each in serve(sys.argv[2:])]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(run.model), *SENTENCES], capture_output=True, text=True, check=True
    )
    served = torch.tensor([[each[name] for name in run.plan.classes] for each in json.loads(done.stdout)])
    assert torch.allclose(served, adapted, atol=1e-4)
    assert not (run.model / "adapter_config.json").exists()


@pytest.mark.slow
def test_the_body_stays_as_it_was_until_it_is_merged(run: orchestrator.Run, minilm: Path) -> None:
    before, after, best = load_file(minilm / "model.safetensors"), weights_of(run), newest(run, "best")
    adapted = [name.split(".lora_A")[0] for name in best if ".lora_A." in name]
    assert len(adapted) == 6 * 6  # query, key, value, and three dense layers, in each of six
    assert sorted(run.lineage["adapted"]) == sorted(adapted)
    for name, tensor in before.items():
        own = f"bert.{name}"
        if own not in after:
            continue
        module = own.removesuffix(".weight")
        if module in adapted:
            added = 2.0 * best[f"{module}.lora_B.default.weight"] @ best[f"{module}.lora_A.default.weight"]
            assert added.abs().max() > 0, name
            assert torch.allclose(after[own], tensor + added, atol=1e-7, rtol=0), name
        else:
            assert torch.equal(after[own], tensor), name
    planned = run.plan.parameters
    assert planned is not None
    assert planned.trained == 16 * 6 * (4 * 2 * 384 + 2 * (384 + 1536))
    assert run.lineage["trained_parameters"] == planned.trained + 2 * 385


@pytest.mark.slow
def test_stopped_and_gone_on_with_it_ends_with_the_same_weights(
    run: orchestrator.Run, minilm: Path, texts: Path
) -> None:
    with pytest.raises(InterruptedRunError):
        orchestrator.finetune(**job_of(minilm, texts, stop=at_call(3)))
    cut = orchestrator.finetune(**job_of(minilm, texts))
    assert same(weights_of(cut), weights_of(run))
    assert [line["train_loss"] for line in cut.metrics] == [line["train_loss"] for line in run.metrics]


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_matrices_are_told_by_the_built_network(form: str, tmp_path: Path, texts: Path) -> None:
    """GPT-2 has its matrices the other way round; merged, it gives what it gave with adapters."""
    backbone = make_language_model(tmp_path / form, form)
    plan = orchestrator.plan(modality="text", backbone=str(backbone), data=str(texts), method="full")
    network = built(plan, backbone)
    names = [name for name, _ in network.module.named_parameters()]
    inputs = {"input_ids": torch.arange(1, 9).view(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    with torch.no_grad():
        plain = network.logits(inputs)
    adapt(network, Adapter(rank=3, alpha=6.0), 0)
    assert len(adapted_modules(network)) == {"gpt2": 2 * 4, "llama": 2 * 7}[form]
    with torch.no_grad():
        assert torch.equal(network.logits(inputs), plain)  # B is zero
        for name, parameter in network.module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        adapted = network.logits(inputs)
        assert not torch.allclose(adapted, plain, atol=1e-3)
        merge(network)
        assert torch.allclose(network.logits(inputs), adapted, atol=1e-5)
    assert [name for name, _ in network.module.named_parameters()] == names
    assert adapted_modules(network) == []


def test_a_network_that_is_no_transformer_is_refused(tiny_resnet: Path, flat_digits: Path) -> None:
    with pytest.raises(RefusedError, match="matrices of a transformer") as caught:
        orchestrator.plan(backbone=str(tiny_resnet), data=str(flat_digits), method="lora")
    assert caught.value.reason == "unsupported"
    assert "lp-ft" in caught.value.mend


def test_a_network_without_layers_has_none_for_an_adapter() -> None:
    network = Network(torch.nn.Module(), (), (), (), lambda _directory, _state: None)
    with pytest.raises(WeightsError, match="no linear layer"):
        adapt(network, Adapter(rank=1, alpha=1.0), 0)


def test_without_peft_it_is_refused_before_the_start(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError) as caught:
        orchestrator.finetune(**job_of(make_bert(tmp_path / "bert"), texts))
    assert "orchestrator[lora]" in caught.value.mend


def test_settings_of_another_method_are_said_to_be_unused(tmp_path: Path, texts: Path) -> None:
    job = job_of(make_bert(tmp_path / "bert"), texts, method="full", training={"lora_rank": 4})
    del job["report"]
    assert any("lora_rank" in warning for warning in orchestrator.plan(**job).warnings)
    job |= {"method": "lora", "training": {"lora_rank": 4}}
    plan = orchestrator.plan(**job)
    assert plan.recipe.adapter == Adapter(rank=4, alpha=8.0)
    assert not any("lora_rank" in warning for warning in plan.warnings)
