"""Where a job runs: how many processes, on which devices, of which cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestrator.job.part import Part


class Scaling(Part):
    """Where it runs. One worker without an address needs no cluster and starts none."""

    num_workers: int = Field(1, ge=1, description="processes that train; more than one run on Ray")
    min_workers: int | None = Field(
        None, ge=1, description="an elastic group: it goes on with so many workers where nodes are lost, and grows "
        "again, up to num_workers, where some join; default: num_workers, always"
    )  # fmt: skip
    address: str | None = Field(
        None, description="a Ray cluster to join: its address, 'auto', or 'local' to start one here"
    )
    num_extractors: int | None = Field(
        None, ge=1, description="method head: processes on Ray that run the frozen body, before the workers train the "
        "head; default: the workers run it"
    )  # fmt: skip
    threads_per_worker: int | None = Field(
        None,
        ge=1,
        description="default: the cores that the system gives, over the workers; OMP_NUM_THREADS is not looked at",
    )
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="auto: GPUs where there is one for each process, else CPUs"
    )
    gpus_per_worker: float = Field(
        1.0, gt=0, le=1, description="less than 1: several processes share a GPU, two where it is 0.5"
    )
    accelerator_type: str | None = Field(
        None, min_length=1, description="GPUs of this kind alone, by Ray's name for it: L4, A100, H100"
    )
    placement: Literal["pack", "spread", "strict-pack", "strict-spread"] = Field(
        "pack", description="the workers on as few nodes as it goes, or on as many; strict: on one alone, or each on "
        "another, or not at all"
    )  # fmt: skip
    wait_s: float = Field(
        1800.0, gt=0, description="on a cluster: how long it waits for its place there, for an autoscaler too"
    )
    max_failures: int = Field(
        2, ge=0, description="how often a dead worker group is restarted; nodes that were taken away do not count"
    )

    @property
    def wanted_device(self) -> Literal["auto", "cpu", "gpu"]:
        """`device`, where auto is gpu once a kind of GPU is named."""
        return "gpu" if self.accelerator_type and self.device == "auto" else self.device

    @property
    def fewest_workers(self) -> int:
        """That it goes on with."""
        return self.min_workers or self.num_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while it runs."""
        return self.fewest_workers < self.num_workers

    @model_validator(mode="before")
    @classmethod
    def _workers_as_a_range(cls, given: Any) -> Any:
        """`workers: {min: 2, max: 16}` is `num_workers: 16, min_workers: 2`; `workers: 4` is `num_workers: 4`."""
        if not isinstance(given, Mapping):
            return given
        if "workers" in given and "num_workers" in given:
            raise ValueError("workers and num_workers are the same, and both are set: take one of the two out")
        name = "workers" if "workers" in given else "num_workers"
        asked = given.get(name)
        if not isinstance(asked, Mapping):
            rest = {key: value for key, value in given.items() if key != "workers"}
            return {**rest, "num_workers": asked} if name == "workers" else given
        if set(asked) != {"min", "max"} or "min_workers" in given:
            raise ValueError(
                f"{name} is a number, or {{min: 2, max: 16}} and no min_workers beside it: it is {dict(asked)}"
            )
        rest = {key: value for key, value in given.items() if key != name}
        return {**rest, "num_workers": asked["max"], "min_workers": asked["min"]}

    @model_validator(mode="after")
    def _in_order(self) -> Scaling:
        if self.fewest_workers > self.num_workers:
            raise ValueError(f"min_workers = {self.min_workers} is more than num_workers = {self.num_workers}")
        return self
