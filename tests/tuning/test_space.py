"""Spaces: what may be searched, what values are drawn, and what is refused before anything starts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from ray import tune

from orchestrator.errors import JobError
from orchestrator.gate import drafted
from orchestrator.tuning.space import Space, make_space

DRAFT = drafted(None, {"backbone": "-", "data": "-"})


def space(**given: Any) -> Space:
    return make_space(given, DRAFT)


def test_names_stand_for_the_keys_of_a_job() -> None:
    made = space(learning_rate=[1e-3], size=[32, 64], backbone=["a", "b"], training={"momentum": tune.uniform(0, 0.9)})
    assert set(made.domains) == {"training.learning_rate", "settings.size", "backbone", "training.momentum"}


def test_domains_of_ray_and_those_of_yaml_draw_the_same() -> None:
    ours = space(
        learning_rate={"loguniform": ["1e-5", 1e-2]}, batch_size={"qrandint": [8, 64, 8]}, method=["head", "full"],
        weight_decay={"uniform": [0, 0.1]},
    )  # fmt: skip
    rays = space(
        learning_rate=tune.loguniform(1e-5, 1e-2), batch_size=tune.qrandint(8, 64, 8),
        method=tune.choice(["head", "full"]), weight_decay=tune.uniform(0, 0.1),
    )  # fmt: skip
    drawn = [list(itertools.islice(one.draws(3), 20)) for one in (ours, rays)]
    assert drawn[0] == drawn[1]
    assert ours.digest() == rays.digest()
    assert all(type(value) in (float, int, str) for value in drawn[0][0].values())
    assert {one["training.batch_size"] % 8 for one in drawn[0]} == {0}


def test_the_draws_of_a_seed_begin_the_same_and_leave_numpy_alone() -> None:
    made = space(
        learning_rate=tune.sample_from(lambda _: 10 ** -np.random.uniform(1, 4)), momentum=tune.uniform(0, 0.9)
    )
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()
    first = list(itertools.islice(made.draws(1), 3))
    assert list(itertools.islice(made.draws(1), 6))[:3] == first != list(itertools.islice(made.draws(2), 3))
    assert np.random.get_state()[1].tolist() == before


def test_a_grid_is_counted_off() -> None:
    made = space(learning_rate=tune.grid_search([1e-3, 1e-2]), batch_size={"grid": [16, 32, 64]})
    assert (made.is_grid, made.num_grid_points) == (True, 6)
    points = [tuple(one.values()) for one in itertools.islice(made.draws(0), 6)]
    assert sorted(points) == sorted(itertools.product([1e-3, 1e-2], [16, 32, 64]))
    assert not space(learning_rate=tune.grid_search([1e-3]), momentum=tune.uniform(0, 0.9)).is_grid


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "is empty"),
        ({"learnin_rate": [1]}, "did you mean training.learning_rate"),
        ({"sizes": [32]}, "did you mean size"),
        ({"seed": [0, 1]}, "may be data.seed or training.seed"),
        ({"task": ["regression"]}, "no score in common"),
        ({"data.seed": [0, 1]}, "judged on different samples"),
        ({"scaling.num_workers": [1, 2]}, "where a trial runs"),
        ({"learning_rate": [1], "training.learning_rate": [2]}, "training.learning_rate twice"),
        ({"learning_rate": 1e-3}, "a value that is the same in all trials"),
        ({"learning_rate": {"logunifrom": [1, 2]}}, "did you mean loguniform"),
        ({"learning_rate": {"loguniform": [0, 1]}}, "loguniform"),
        ({"learning_rate": {"uniform": [1, 2, 3, 4]}}, "uniform"),
        ({"learning_rate": {"choice": 3}}, "expected: a list"),
        ({"learning_rate": []}, "expected: a list"),
        ({"learning_rate": [1e-3, -1]}, "training.learning_rate = -1"),
        ({"label_smoothing": tune.uniform(0, 1.5)}, "less than 1"),
        ({"batch_size": tune.randint(0, 64)}, "1 or more"),
        ({"method": ["head", "ful"]}, "did you mean full"),
        ({"size": [4, 64]}, "8 or more"),
        ({"epochs": tune.sample_from(lambda _: -1)}, "1 or more"),
        ({"epochs": tune.sample_from(lambda spec: spec.config.nothing)}, "nothing can be drawn"),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused_with_its_mend(given: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError) as refused:
        make_space(given, DRAFT)
    assert words in str(refused.value)
    assert refused.value.mend


def test_an_open_end_of_a_range_is_no_value() -> None:
    assert space(label_smoothing=tune.uniform(0, 1)).domains
