"""WordNet's glosses as a table of texts: python examples/glosses/make_data.py

Writes examples/glosses/data/glosses.csv with the columns text and label: what a noun means, and which of the 25
lexicographers' classes (animal, artifact, food, ...) it is of. 400 glosses a class at most, chosen by a fixed seed.

The glosses are those of Debian's package wordnet-base (WordNet 3.0). Where it is not installed, it is fetched with
`apt-get download`, which needs no root. Elsewhere:
python examples/glosses/make_data.py --wordnet DIRECTORY_OF_DATA.NOUN
"""

from __future__ import annotations

import argparse
import csv
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = Path("/usr/share/wordnet")
PER_CLASS = 400
# Numbers 3 to 28 of lexnames(5WN), nouns; 3 is "Tops", the beginners of the others.
CLASSES = (
    "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling", "food",
    "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity",
    "relation", "shape", "state", "substance", "time",
)  # fmt: skip


def read_nouns(directory: Path) -> bytes:
    """data.noun, from the directory or from the package."""
    if (directory / "data.noun").is_file():
        return (directory / "data.noun").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=folder, check=True, capture_output=True)
            package = next(Path(folder).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration):
            sys.exit("WordNet is not here: apt-get install wordnet-base, or name its directory with --wordnet")
        return (Path(folder) / "usr/share/wordnet/data.noun").read_bytes()


def make_data(directory: Path = INSTALLED, out: Path = HERE / "data") -> Path:
    """The table's path."""
    glosses = defaultdict(set)
    for line in read_nouns(directory).decode("utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        number = int(line.split(" ", 2)[1])
        if number > 3:
            # What stands behind a semicolon in quotes are examples.
            glosses[CLASSES[number - 4]].add(line.partition(" | ")[2].split('; "')[0].strip())
    rows = []
    for label in CLASSES:
        chosen = sorted(glosses[label])
        random.Random(0).shuffle(chosen)
        rows += [(text, label) for text in chosen[:PER_CLASS]]
    out.mkdir(parents=True, exist_ok=True)
    file = out / "glosses.csv"
    with file.open("w", newline="", encoding="utf-8") as table:
        writer = csv.writer(table)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    return file


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=INSTALLED)
    print(make_data(parser.parse_args().wordnet))
