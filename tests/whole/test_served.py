"""What every recipe leaves is a model that transformers serves, where there is neither this package nor peft."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import orchestrator
from tests.distributed.bare import bare_python
from tests.tiny import SENTENCES, make_bert
from tests.toys import write_toys
from tests.whole.test_train import silent

RECIPES: dict[str, dict[str, Any]] = {
    "auto": {}, "contrastive": {"training.loss": "contrastive"}, "refit": {"training.refit": True},
    "average": {"method": "full", "training.ema": 0.9},
    **{method: {"method": method} for method in ("head", "full", "lp-ft", "lora", "scratch")},
}  # fmt: skip
SERVE = """
import importlib.util, json, sys
from transformers import pipeline
sys.modules["peft"] = None
assert importlib.util.find_spec("orchestrator") is None
texts, *models = json.loads(sys.stdin.read())
serve = [pipeline("text-classification", model=model, top_k=None)(texts) for model in models]
print(json.dumps([[{one["label"]: one["score"] for one in said} for said in each] for each in serve]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_each_recipe_s_model_says_in_transformers_what_predict_says(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    backbone, table = make_bert(tmp_path / "bert"), write_toys(tmp_path, "text")
    runs = {
        name: orchestrator.finetune(
            modality="text", backbone=str(backbone), report=silent, scaling={"threads_per_worker": 1}, name=name,
            data={"path": str(table), "test_fraction": 0.25, "validation_fraction": 0.25},
            **{"training.epochs": 2, "training.batch_size": 8, **recipe},
        )
        for name, recipe in RECIPES.items()
    }  # fmt: skip
    assert [phase.loss for phase in runs["contrastive"].plan.recipe.phases] == ["task", "contrastive"]
    texts = [f"{one} and {other}" for one, other in zip(SENTENCES, SENTENCES[3:], strict=False)]
    python = bare_python(tmp_path / "bare")
    done = subprocess.run(
        [python, "-I", "-c", SERVE], input=json.dumps([texts, *(str(run.model) for run in runs.values())]),
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, run), served in zip(runs.items(), json.loads(done.stdout), strict=True):
        for ours, theirs in zip(orchestrator.predict(run, texts, top=10), served, strict=True):
            assert ours.label == max(theirs, key=theirs.get), name
            assert {label: pytest.approx(score, abs=1e-5) for label, score in ours.top} == theirs, name
