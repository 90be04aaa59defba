"""Of a job: where the labelled samples are, and how they are split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from orchestrator.job.part import Part
from orchestrator.job.places import plain_path, require_no_secret

VALIDATION_FRACTION = 0.1
"""Of the training samples, where a job leaves it open."""


class Data(Part):
    """Where the labelled samples are, and how they are split."""

    path: str = Field(
        min_length=1,
        description="a folder of class folders, a .csv, .parquet or .jsonl table, a data set of the Hub (org/name) or "
        "one that was saved to disk; a path or a URI such as s3://bucket/table.parquet",
    )
    subset: str | None = Field(None, description="of a data set of the Hub that has several")
    validation: str | None = Field(None, description="the validation split, where it stands on its own")
    test: str | None = Field(None, description="the test split, where it stands on its own")
    root: str | None = Field(None, description="what a table's paths are relative to; default: its folder")
    rows_root: str | None = Field(
        None, description="the same for rows of a program, where other splits are places; default: as it runs"
    )
    input_column: str | tuple[str, ...] | None = Field(
        None, description="a table's column of paths, bytes or texts; two columns for pairs of texts"
    )
    label_column: str | tuple[str, ...] = Field(
        "label", description="a table's column of labels; several columns for multi-label (0 or 1) or regression"
    )
    label_separator: str | None = Field(
        None, min_length=1, description="multi-label: what stands between the labels of one cell"
    )
    separator: str | None = Field(
        None, description="of a CSV or TSV table: what separates its cells, a character or tab; default: by the suffix "
        "and the first line"
    )  # fmt: skip
    encoding: str | None = Field(
        None, description="of a CSV, TSV or JSON lines table: cp1252 for example; default: by its mark, else UTF-8"
    )
    split_column: str | None = Field(None, description="a table's column that says train, validation or test")
    group_column: str | None = Field(None, description="samples of one group stay on one side of every split")
    validation_fraction: float | None = Field(
        None, ge=0, lt=1, description="held back to choose the best epoch; default: 0.1, with method auto 0 where that "
        "would be fewer than 10 samples"
    )  # fmt: skip
    test_fraction: float = Field(0.1, ge=0, lt=1, description="held back for the final figures")
    num_train: int | None = Field(None, ge=2, description="train on so many samples only, classes balanced")
    seed: int = Field(0, ge=0, description="of the split")
    on_bad_sample: Literal["fail", "skip"] = Field("fail", description="what a broken sample does")

    @field_validator("path", "validation", "test", "root", "rows_root")
    @classmethod
    def _plain_paths(cls, place: str | None) -> str | None:
        """A file:// URI is the path: so that links and runs inside the data are looked at as everywhere here."""
        return place if place is None else require_no_secret(plain_path(place))

    @field_validator("separator")
    @classmethod
    def _one_character(cls, separator: str | None) -> str | None:
        """A tabulator by its name too: it is hard to type."""
        separator = "\t" if separator in ("tab", "\\t") else separator
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise ValueError("has to be one character, no quotation mark and no line break, or tab")
        return separator

    @field_validator("encoding")
    @classmethod
    def _is_encoding(cls, encoding: str | None) -> str | None:
        if encoding is not None:
            try:
                "a".encode(encoding)
            except (LookupError, ValueError):
                raise ValueError("is no encoding of text that is known; utf-8, utf-16 and cp1252 are") from None
        return encoding

    @model_validator(mode="after")
    def _fractions(self) -> Data:
        validation = VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction
        if validation + self.test_fraction >= 1:
            raise PydanticCustomError(
                "nothing_to_train_on",
                "validation_fraction {validation} and test_fraction {test} leave nothing to train on",
                {
                    "validation": validation,
                    "test": self.test_fraction,
                    "mend": "lower one: their sum is below 1",
                },
            )
        return self
