"""Recordings to try the plugin on: noise in three channels, and in the second one a sine, its frequency the class.

python ../examples/third_party/make_data.py    # in a folder of your own: writes machines/ (180) and pumps/ (120)
"""

from pathlib import Path

import numpy as np

SETS = {"machines": {"slow": 0.2, "steady": 0.5, "fast": 1.0}, "pumps": {"left": 0.2, "right": 1.0}}


def make_data(root: Path) -> None:
    """Class folders of .npy files, the same each time."""
    random = np.random.default_rng(0)
    for name, classes in SETS.items():
        for label, frequency in classes.items():
            folder = root / name / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(60):
                signal = random.normal(scale=0.3, size=(3, random.integers(90, 160))).astype(np.float32)
                signal[1] += np.sin(frequency * np.arange(signal.shape[1]) + random.uniform(0, 6))
                np.save(folder / f"{i}.npy", signal)


if __name__ == "__main__":
    make_data(Path.cwd())
