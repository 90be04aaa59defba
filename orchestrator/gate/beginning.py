"""What a run's directory begins with: its job, its plan, and what was left out of its data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic_core import PydanticSerializationError

from orchestrator.errors import DataError, first_line
from orchestrator.job import Job, Plan, open_storage

if TYPE_CHECKING:
    from orchestrator.data import Prepared


def texts_of(job: Job, plan: Plan, prepared: Prepared) -> dict[str, str]:
    """{file: its text} of what the run's directory begins with. Raises `DataError` for names that are no Unicode."""
    # With whole paths, so that it says the same from any directory.
    at = job.at_whole_paths().model_copy(update={"name": plan.name, "storage": open_storage(job.storage).place})
    lines = [json.dumps({"place": s.place, "problem": s.problem}, ensure_ascii=False) for s in prepared.skipped]
    try:
        texts = {"job.yaml": at.to_yaml()}
        if lines:
            texts["skipped.jsonl"] = "".join(f"{line}\n" for line in lines)
        texts["plan.json"] = plan.model_dump_json(indent=1)
        for text in texts.values():
            text.encode()
    except (UnicodeEncodeError, PydanticSerializationError) as error:
        raise DataError(
            f"a label or a path of the data of {plan.name} holds half a character: {first_line(error)}",
            expected="Unicode text",
            mend="correct it in the table",
        ) from None
    return texts
