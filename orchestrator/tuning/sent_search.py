"""A search as a job for a cluster: checked here, sent whole, and run there as anywhere.

What it is asked for beside its job stands in the job's block `search`, as in a job file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.distributed.request import Sent
from orchestrator.errors import RefusedError
from orchestrator.job import DirectoryStorage, Draft, Report, Stop, hold
from orchestrator.tuning.layout import Layout
from orchestrator.tuning.pending import is_stackable
from orchestrator.tuning.sent_ranking import sent_tree, whole_backbone
from orchestrator.tuning.settings import BLOCK, settings_and_space
from orchestrator.tuning.space import Space, draft_with, is_grid, make_space, values_of
from orchestrator.tuning.study import backbones_of, first_plan, search, search_name


def search_to_send(draft: Draft, report: Report) -> Sent:
    """The search of that job and its block. Raises `RefusedError`, as `search` does before anything starts."""
    bare, settings, asked = settings_and_space(draft, None, {})
    _refuse_objects({"scheduler": settings.scheduler, "search_alg": settings.search_alg, "space": asked})
    space = make_space(asked, bare)
    first = draft_with(bare, next(space.draws(settings.seed))).job()
    with (
        TemporaryDirectory(prefix="orchestrator-search-") as folder,
        hold(DirectoryStorage(Path(folder)), "search") as held,
    ):
        layout = Layout(bare, held, report)
        plans = [first_plan(layout, space, settings, one) for one in backbones_of(space, first)]
    tree = sent_tree(first)
    for key in space.domains:
        _take_out(tree, key)
    block = {**settings.model_dump(mode="json", exclude_unset=True), "space": _at_whole_paths(asked, space)}
    sent = Draft({**tree, BLOCK: block}, "", {})
    name = first.name or search_name(first, make_space(block["space"], replace(sent, tree=tree)), settings)
    heads_alone = all(is_stackable(plan) for plan in plans) and "method" not in space.domains
    return Sent({**sent.tree, "name": name}, name, tree["storage"], plans[0], tuple(plans[1:]), not heads_alone)


def run_search(tree: Mapping[str, Any], fresh: bool, report: Report, stop: Stop) -> tuple[str, dict[str, Any]]:
    """On the cluster: (where the search lies, what came of it, as `orchestrator search --json` prints it)."""
    result = search(tree, fresh=fresh, report=report, stop=stop)
    return result.place, result.as_dict()


def _take_out(tree: dict[str, Any], key: str) -> None:
    group, _, inner = key.rpartition(".")
    if not group:
        tree.pop(inner, None)
    elif group in tree:
        tree[group] = {name: value for name, value in tree[group].items() if name != inner}


def _at_whole_paths(asked: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """The space with whole paths of backbones that lie in folders."""
    domain = space.domains.get("backbone")
    backbones = values_of(domain)
    if not backbones:
        return dict(asked)
    word = "grid_search" if is_grid(domain) else "choice"
    return {**asked, "backbone": {word: [whole_backbone(one) for one in backbones]}}


def _refuse_objects(asked: Mapping[str, Any]) -> None:
    """Raise `RefusedError` for what is no plain data: it would have to be pickled."""
    for key, value in asked.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise RefusedError(
                "usage", f"{BLOCK}.{key} holds what does not travel with a job: {error}",
                expected="names and numbers, as in a job file: asha, {loguniform: [1e-5, 1e-2]}",
                mend="write it as docs/search.md shows, or join the cluster: orchestrator search --address HOST:6379",
            ) from None  # fmt: skip
