"""The same as head-image as whole processes, imports included: make bench NAME=head-image-process

A process each: HF Trainer, ours with an empty storage, and ours again on that storage with another learning rate, when
the features are there already. Goals: 8 times as fast as HF Trainer, 12 times where the features are stored.
"""

from __future__ import annotations

import tempfile

from tests.benchmarks.harness import Finished, in_turn, middle, near, options, process, report
from tests.benchmarks.head_image import RATE, REPEATS
from tests.benchmarks.peers import make_digits

GOAL, GOAL_STORED = 8, 12


def main() -> None:
    parser = options(__doc__, REPEATS)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    make_digits()
    with tempfile.TemporaryDirectory() as folder:

        def side(name: str, repeat: int, *more: str) -> Finished:
            place = ("--side", name, "--storage", f"{folder}/{repeat}", "--seed", str(repeat))
            return process("head_image", *place, "--epochs", str(given.epochs), *more)

        sides = {
            "peer": lambda i: [side("peer", i)],
            "ours, then on stored features": lambda i: [side("ours", i), side("ours", i, "--rate", str(RATE / 2))],
        }
        _, found = in_turn(sides, given.repeats, lambda runs: "; ".join(map(str, runs)))
    peer, both = found.values()
    rows = {"peer": [one for (one,) in peer], "ours": [one for one, _ in both], "stored": [one for _, one in both]}
    seconds = {name: [round(one.seconds, 3) for one in runs] for name, runs in rows.items()}
    theirs = middle(seconds["peer"])
    report(
        "head-image-process",
        [
            ("HF Trainer's process over ours", middle([theirs / middle(seconds["ours"])]), GOAL, True),
            ("over ours with stored features", middle([theirs / middle(seconds["stored"])]), GOAL_STORED, True),
        ],
        ours_s=seconds["ours"],
        stored_s=seconds["stored"],
        peer_s=seconds["peer"],
        peak_mb={name: [round(one.peak_mb) for one in runs] for name, runs in rows.items()},
        accuracy=near(*([one.answer["accuracy"] for one in rows[side]] for side in ("ours", "peer"))),
    )


if __name__ == "__main__":
    main()
