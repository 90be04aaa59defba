"""Data sets of the `datasets` library: a repository on the Hub, or a directory that `save_to_disk` wrote -> tables.

Images and recordings come as the bytes of their files, which the modality's own plugin decodes; numbers of a
ClassLabel come as the names of their classes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.backbone import ask_hub, offline
from orchestrator.data.arrow_cells import ArrowBatch, cells_of
from orchestrator.data.tables import BATCH_ROWS, Table
from orchestrator.errors import DataError, MissingExtraError, first_line
from orchestrator.job import choose_splits, dataset_id, name_splits


def is_saved(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk`."""
    if os.path.isfile(path / "dataset_dict.json"):  # not Path.is_file, which raises where one may not look
        return any(_is_saved_split(child) for child in path.iterdir())
    return _is_saved_split(path)


def _is_saved_split(path: Path) -> bool:
    """A file state.json alone may be of anything."""
    has = os.path.isfile(path / "state.json")
    return has and ((path / "dataset_info.json").is_file() or any(path.glob("*.arrow")))


def open_saved(path: Path) -> tuple[list[Table], list[str]]:
    """(a table a split, notes) of a directory that `save_to_disk` wrote. Raises `DataError` where it is damaged."""
    library = _library()
    try:
        return _tables(library.load_from_disk(str(path)), str(path), path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read: {first_line(error)}", expected="a directory as datasets' save_to_disk writes it",
            mend="save it again",
        ) from None  # fmt: skip


def open_repository(place: str, subset: str | None) -> tuple[list[Table], list[str]]:
    """(a table a split, notes) of a data set on the Hub, downloaded at one commit; code of it is never run.

    Raises `RefusedError`, `DataError`.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    library = _library()
    name, revision = dataset_id(place)
    try:
        commit = ask_hub(place, lambda: HfApi().dataset_info(name, revision=revision)).sha
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise offline(place, error) from error
    try:
        data = ask_hub(place, lambda: library.load_dataset(name, subset, revision=commit))
    except (HTTPError, OfflineModeIsEnabled, ConnectionError) as error:
        raise offline(place, error) from error
    except library.exceptions.DatasetsError as error:
        raise _unreadable(place, error) from None
    except (ValueError, OSError, RuntimeError) as error:
        if "onfig name is missing" in str(error) or (subset and "BuilderConfig" in str(error)):
            raise DataError(
                f"{place} has several subsets, and data.subset is {subset!r}: {first_line(error)}",
                expected="the name of one of its subsets", mend="name it: --set data.subset=NAME",
            ) from None  # fmt: skip
        raise _unreadable(place, error) from None
    from huggingface_hub.constants import HF_HUB_CACHE

    tables, notes = _tables(data, place, Path(HF_HUB_CACHE))
    return tables, [f"{name} at commit {commit}", *notes]


def splits_of(splits: Any, text: str) -> list[tuple[int | None, Any]]:
    """[(0 train, 1 validation, 2 test, None: not said; `Dataset`)] of a `DatasetDict` that a program holds.

    Warns of parts that are no split. `text` is what messages call it. Raises `DataError` where there is none to train
    on.
    """
    chosen, notes = choose_splits(name_splits(splits), text)
    for note in notes:
        warnings.warn(f"{text}: {note}", stacklevel=2)
    return [(split, splits[name]) for name, split in chosen.items()]


def rows_of(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a `Dataset` or `IterableDataset` that a program holds, {column: cell}."""
    if not dataset.features:  # of an iterable one that knows its columns only by its rows
        yield from dataset
        return
    table = _table(dataset, "", Path(), None)
    for batch in table.batches(table.columns):
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(batch, cells, strict=True))


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "datasets") from None
    return datasets


def _unreadable(place: str, error: Exception) -> DataError:
    return DataError(
        f"{place} cannot be read as a data set: {first_line(error)}",
        expected="a data set repository of tables (CSV, JSON lines, Parquet), or of class folders",
        mend="look at its page; a repository that needs code of its own to be read cannot be used",
    )


def _tables(data: Any, text: str, root: Path) -> tuple[list[Table], list[str]]:
    """(a table a split, notes) of a `DatasetDict` or a `Dataset`."""
    if not hasattr(data, "keys"):
        return [_table(data, text, root, None)], []
    chosen, notes = choose_splits(name_splits(data), text)
    return [_table(data[name], f"{text} {name}", root, split) for name, split in chosen.items()], notes


def _table(dataset: Any, text: str, root: Path, split: int | None) -> Table:
    features = dataset.features

    def read(wanted: Sequence[str]) -> Iterator[ArrowBatch]:
        columns = list(dict.fromkeys(wanted))
        chosen = dataset.select_columns(columns)
        for name in columns:
            if hasattr(features[name], "decode"):
                chosen = chosen.cast_column(name, type(features[name])(decode=False))
        names = {name: names for name in columns if (names := _class_names(features[name])) is not None}
        for batch in chosen.with_format("arrow").iter(batch_size=BATCH_ROWS):
            cells = cells_of(batch, names)
            for name in columns:
                if hasattr(features[name], "decode"):
                    cells[name] = [_with_bytes(cell) for cell in cells[name]]
            yield cells

    return Table(text, tuple(dataset.column_names), read, root, split)


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, alone or in a list."""
    inner = getattr(feature, "feature", feature)
    names = getattr(inner, "names", None)
    return list(names) if names is not None and type(inner).__name__ == "ClassLabel" else None


def _with_bytes(cell: Any) -> Any:
    """A file that the library itself has fetched or unpacked, read: other machines have no such cache."""
    if not isinstance(cell, dict) or cell.get("bytes") is not None or not cell.get("path"):
        return cell
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    real = os.path.realpath(cell["path"])
    for root in (str(HF_DATASETS_CACHE), HF_HUB_CACHE):
        if os.path.commonpath([os.path.realpath(root), real]) == os.path.realpath(root) and os.path.isfile(real):
            return {"bytes": Path(real).read_bytes(), "path": cell["path"]}
    return cell
