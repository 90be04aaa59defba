"""Runs by their places and names: which is meant, and which there are in a storage."""

from __future__ import annotations

import difflib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orchestrator.errors import RefusedError
from orchestrator.job.damage import is_run
from orchestrator.job.directories import DirectoryStorage, require_no_file
from orchestrator.job.manifests import GONE
from orchestrator.job.places import is_uri, local_path, plain_path
from orchestrator.job.runs import Run, open_storage, run_in
from orchestrator.job.spec import Job

_ASKED_AT_ONCE = 16
"""Runs of an object store that are looked at together."""
SEARCH_FILE, BEST_OF_SEARCH = "search.json", "best"
"""What the directory of a search holds instead of a plan, and the key there of the name of its best run."""


_USUAL = Job.model_fields["storage"].default
"""The storage of a run that names none."""


def open_run(place: str | Path) -> Run:
    """The run at that directory or URI, of a search its best one; a name alone may be that of one in `runs`.

    Raises `RefusedError` where there is none.
    """
    run = run_at(place)
    if is_search(run):
        return _best_of(run)
    if run.storage.read(f"{run.name}/plan.json") is None:
        if is_run(run.storage.children(run.name)):
            raise run.damaged({"plan.json": GONE})
        run.storage.require()
        usual = Path(_USUAL) / run.name
        if isinstance(run.at, Path) and run.at.parent == Path.cwd() and is_run_at(usual):
            return open_run(usual)
        raise RefusedError(
            "not_found",
            f"there is no run {place}",
            expected="a directory, or a place in a store, that a finetune or pretrain command made",
            mend=_nearest(run, Path(place)) or "list them: orchestrator runs",
        )
    return run


def run_at(place: str | Path) -> Run:
    """A run by its directory or URI, whether it is there or not."""
    text = plain_path(str(place)).rstrip("/") if isinstance(place, str) else ""
    return Run(text if is_uri(text) else local_path(text or place).absolute())


def _nearest(run: Run, given: Path) -> str:
    """`did you mean ...?` of a part of a run, and of a name that is like that of a run beside it, else ''."""
    if not isinstance(run.at, Path):
        return ""
    above = next((one for one in run.at.parents if (one / "plan.json").is_file()), None)
    if above is not None:
        return f"did you mean {above if given.is_absolute() else os.path.relpath(above)}?"
    places = [given.parent, *([Path(_USUAL)] if run.at.parent == Path.cwd() else [])]
    beside = {file.parent.name: file.parent for place in reversed(places) for file in place.glob("*/plan.json")}
    near = difflib.get_close_matches(given.name, beside, n=1)
    return f"did you mean {beside[near[0]]}?" if near else ""


def is_search(run: Run) -> bool:
    """Whether the directory is a search's, whose trials are runs beside it."""
    return run.storage.read(f"{run.name}/{SEARCH_FILE}") is not None


def _best_of(search: Run) -> Run:
    best = search.read_object(SEARCH_FILE).get(BEST_OF_SEARCH)
    if not isinstance(best, str) or not best.startswith(f"{search.name}."):
        raise RefusedError(
            "not_found", f"the search {search.place} has not ended, so that it has no best run yet",
            expected="a search that has ended", mend="go on with it by the command that it began with",
        )  # fmt: skip
    return run_in(search.storage, best)


def open_finished(place: str | Path) -> Run:
    """The run at that directory or URI, which has finished. Raises `RefusedError` where it has not, or is none."""
    run = open_run(place)
    _ = run.results
    return run


def is_trial_of(search: Run, name: str) -> bool:
    """Whether that is the name of a run of a search's trial: `the-search.0007`, `the-search.0007.1`."""
    return re.fullmatch(rf"{re.escape(search.name)}\.\d{{4,}}(\.\d+)?", name) is not None


def list_runs(storage: str | Path) -> list[Run]:
    """The runs of a storage, by name. Raises `RefusedError` where it is a file, or a store that refuses us."""
    return list_places(storage)[0]


def list_places(storage: str | Path) -> tuple[list[Run], list[Run]]:
    """(the runs of a storage, its searches), by name, each folder looked at once. Raises as `list_runs` does."""
    if is_uri(str(storage)):
        there = open_storage(str(storage))
        there.require()
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            names = there.children()
            folders = [
                (run_in(there, name), held) for name, held in zip(names, pool.map(there.children, names), strict=True)
            ]
    else:
        place = local_path(storage)
        require_no_file(place, str(storage))
        here = DirectoryStorage(place)
        folders = [(Run(place / name), here.children(name)) for name in here.children()]
    return [run for run, names in folders if is_run(names)], [run for run, names in folders if SEARCH_FILE in names]


def is_run_at(path: Path) -> bool:
    """Whether a directory is a run; one that has lost its plan.json is."""
    return is_run(DirectoryStorage(path.parent).children(path.name))
