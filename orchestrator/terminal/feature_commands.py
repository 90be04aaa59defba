"""`orchestrator features`: what is kept of frozen bodies, on a storage or in an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.terminal.flags import Json

if TYPE_CHECKING:
    from orchestrator.store import Root

app = typer.Typer(help="What frozen bodies gave for samples, kept on the storage for later runs.")
Storage = Annotated[str, typer.Option(help="where the runs lie: a directory or s3://…")]
FeatureStore = Annotated[
    str | None, typer.Option(help="the features of an object store (s3://…), instead of the storage's")
]  # fmt: skip


@app.command("list")
def list_features(storage: Storage = "runs", feature_store: FeatureStore = None, json_: Json = False) -> None:
    """List the sets of features, the one used last first."""
    from orchestrator.store import inventory
    from orchestrator.terminal import answers

    answers.show_features(inventory.listings(_features_at(storage, feature_store)), feature_store or storage, json_)


@app.command("show")
def show_features(
    name: Annotated[str, typer.Argument(help="as `features list` shows it; its beginning will do")],
    storage: Storage = "runs",
    feature_store: FeatureStore = None,
    json_: Json = False,
) -> None:
    """Show what a set of features is of."""
    from orchestrator.store import inventory
    from orchestrator.terminal import answers

    answers.show_feature_set(inventory.find_listing(_features_at(storage, feature_store), name), json_)


@app.command("prune")
def prune_features(
    max_size: Annotated[str, typer.Option(help="keep so much at most: 50GB, 500MB, 0")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tell what would be removed, and remove nothing")] = False,
    storage: Storage = "runs",
    feature_store: FeatureStore = None,
    json_: Json = False,
) -> None:
    """Remove the sets that were not used for longest, and sample tables that no run of the storage uses any more.

    A run that wants features that were removed computes them again.

    orchestrator features prune --max-size 50GB
    """
    from orchestrator.data import tables_in
    from orchestrator.job import open_storage
    from orchestrator.store import inventory
    from orchestrator.terminal import answers

    root, size = _features_at(storage, feature_store), inventory.parse_size(max_size)
    before = inventory.listings(root)
    removed = inventory.prune(root, size, dry_run, before)
    gone = {one.name for one in removed}
    tables = tables_in(open_storage(storage)).prune(dry_run) if feature_store is None else []
    answers.show_pruned(removed, [one for one in before if one.name not in gone], tables, dry_run, json_)


def _features_at(storage: str, feature_store: str | None) -> Root:
    from orchestrator.store import inventory

    return inventory.of_storage(storage) if feature_store is None else inventory.of_store(feature_store)
