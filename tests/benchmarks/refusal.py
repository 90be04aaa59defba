"""How long a refusal takes from the shell: the process, the gate, the message. Goal: under 0.5 s, median of 5.

make bench NAME=refusal
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL_S = 0.5
REPEATS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder)
        (backbone / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
        (backbone / "model.safetensors").write_bytes(b"")
        command = [str(Path(sys.executable).with_name("orchestrator")), "check", str(backbone), "--modality"]
        seconds: dict[str, list[float]] = {"audio": [], "text": []}
        for _ in range(REPEATS):
            for modality, mine in seconds.items():
                start = time.monotonic()
                done = subprocess.run([*command, modality], capture_output=True, text=True, check=False)
                mine.append(round(time.monotonic() - start, 3))
                assert done.returncode == 2, done.stderr
                assert "wrong_modality" in done.stderr
    median = max(statistics.median(mine) for mine in seconds.values())
    print(
        json.dumps({"name": "refusal", "ours_s": seconds, "median_s": median, "goal": GOAL_S, "met": median < GOAL_S})
    )


if __name__ == "__main__":
    main()
