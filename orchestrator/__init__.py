"""Transfer learning on Ray: a trained network, a new last layer, your data.

    import orchestrator
    run = orchestrator.finetune(backbone="microsoft/resnet-50", data="photos/")
    orchestrator.predict(run, ["photo.jpg"])

Names are loaded when they are first used, so that `import orchestrator` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orchestrator.errors import missing_extra

if TYPE_CHECKING:
    from orchestrator.errors import OrchestratorError as OrchestratorError
    from orchestrator.errors import RefusedError as RefusedError
    from orchestrator.gate.planning import check as check
    from orchestrator.gate.planning import plan as plan
    from orchestrator.job.plans import BackboneCard as BackboneCard
    from orchestrator.job.plans import Plan as Plan
    from orchestrator.job.runs import Run as Run
    from orchestrator.job.runs import open_run as open_run
    from orchestrator.job.spec import Job as Job
    from orchestrator.modality.contract import Modality as Modality
    from orchestrator.modality.registry import register as register
    from orchestrator.predictor import evaluate as evaluate
    from orchestrator.predictor import predict as predict
    from orchestrator.train import finetune as finetune
    from orchestrator.train import pretrain as pretrain

# No module may have the name of a public function: importing `orchestrator.x` would replace `orchestrator.x()`.
_HOMES = {
    "BackboneCard": "job.plans",
    "Job": "job.spec",
    "Modality": "modality.contract",
    "OrchestratorError": "errors",
    "Plan": "job.plans",
    "RefusedError": "errors",
    "Run": "job.runs",
    "check": "gate.planning",
    "evaluate": "predictor",
    "finetune": "train",
    "open_run": "job.runs",
    "plan": "gate.planning",
    "predict": "predictor",
    "pretrain": "train",
    "register": "modality.registry",
}

__all__ = sorted(_HOMES)  # one list of names, not two


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orchestrator' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"orchestrator.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
