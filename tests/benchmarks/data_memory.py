"""Peak memory of reading a job's data, as the rows grow tenfold: make bench NAME=data-memory

Each reading is a process of its own. Of a row its label, split, size and the digests of its URI, label and content
are remembered, some 60 bytes, and copied in part while splits are made: the goal is 150 bytes a row, whatever a
row holds. Those of texts here hold some 200 bytes, those of images some 3,000.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

GOAL_BYTES_A_ROW = 150
REPEATS = 3
NUM_ROWS = {"text": (100_000, 1_000_000), "image": (10_000, 100_000)}


def write(kind: str, num_rows: int, file: Path) -> None:
    """A Parquet table of so many rows, made a piece at a time."""
    random = np.random.default_rng(0)
    words = [f"word{i}" for i in range(1000)]
    writer = None
    for start in range(0, num_rows, 1000):
        labels = [f"class {i % 7}" for i in range(start, start + 1000)]
        if kind == "text":
            chosen = random.integers(0, 1000, (1000, 30))
            table = pa.table({"text": [" ".join(words[i] for i in row) for row in chosen], "label": labels})
        else:
            # Every image other bytes: noise behind a real header is what a JPEG of a camera is like.
            from tests.data.test_prepare import png

            head = png(7)
            cells = [head + random.bytes(3000) for _ in range(1000)]
            table = pa.table({"image": cells, "label": labels})
        writer = writer or pa.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure(kind: str, file: str) -> None:
    """In a process of its own: read the data as a job does, and print the peak in bytes."""
    from orchestrator.data.prepare import prepare_data
    from orchestrator.job.plans import BackboneCard
    from orchestrator.job.spec import Data
    from orchestrator.modality import registry

    with tempfile.TemporaryDirectory(dir=Path(file).parent) as folder:
        card = BackboneCard(source="b", kind="directory", name="b")
        found = prepare_data(Data(path=file), registry.get(kind), card, directory=Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "rows": sum(found.summary.num_samples.values())}))


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, sizes in NUM_ROWS.items():
            peaks: dict[int, list[int]] = {size: [] for size in sizes}
            for size in sizes:
                write(kind, size, Path(folder) / f"{kind}-{size}.parquet")
            for _ in range(REPEATS):
                for size in sizes:
                    command = [
                        sys.executable,
                        "-m",
                        "tests.benchmarks.data_memory",
                        kind,
                        f"{folder}/{kind}-{size}.parquet",
                    ]
                    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    answer = json.loads(out.splitlines()[-1])
                    assert answer["rows"] == size
                    peaks[size].append(answer["peak"])
            few, many = (statistics.median(peaks[size]) for size in sizes)
            found[kind] = {
                "peak_mb": {size: [round(peak / 2**20) for peak in peaks[size]] for size in sizes},
                "file_mb": {
                    size: round((Path(folder) / f"{kind}-{size}.parquet").stat().st_size / 2**20) for size in sizes
                },
                "bytes_a_row": round((many - few) / (sizes[1] - sizes[0]), 1),
            }
            print(kind, found[kind], file=sys.stderr)
    worst = max(one["bytes_a_row"] for one in found.values())
    print(json.dumps({"name": "data-memory", **found, "goal": GOAL_BYTES_A_ROW, "met": worst <= GOAL_BYTES_A_ROW}))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], sys.argv[2])
    else:
        main()
