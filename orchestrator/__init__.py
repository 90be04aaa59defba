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
    from orchestrator.errors import OrchestratorError as OrchestratorError, RefusedError as RefusedError
    from orchestrator.gate import check as check
    from orchestrator.job import (
        BackboneCard as BackboneCard,
        Job as Job,
        Plan as Plan,
        Run as Run,
        open_run as open_run,
    )
    from orchestrator.modality import Modality as Modality, register as register
    from orchestrator.predictor import evaluate as evaluate, predict as predict
    from orchestrator.rehearsal import plan as plan
    from orchestrator.remote import RemoteRun as RemoteRun, attach as attach
    from orchestrator.submission import submit as submit
    from orchestrator.train import finetune as finetune, pretrain as pretrain
    from orchestrator.tuning import RankTable as RankTable, rank as rank, search as search

# No module may have the name of a public function: importing `orchestrator.x` would replace `orchestrator.x()`.
_HOMES = {
    "BackboneCard": "job",
    "Job": "job",
    "Modality": "modality",
    "OrchestratorError": "errors",
    "Plan": "job",
    "RankTable": "tuning",
    "RefusedError": "errors",
    "RemoteRun": "remote",
    "Run": "job",
    "attach": "remote",
    "check": "gate",
    "evaluate": "predictor",
    "finetune": "train",
    "open_run": "job",
    "plan": "rehearsal",
    "predict": "predictor",
    "pretrain": "train",
    "rank": "tuning",
    "register": "modality",
    "search": "tuning",
    "submit": "submission",
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
