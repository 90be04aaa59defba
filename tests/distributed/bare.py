"""A Python for the nodes of a cluster that has Ray and all that this package needs, and not this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def bare_python(folder: Path) -> str:
    """An environment with the libraries of this one; what is installed in place, this package say, it does not see."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    python = folder / "bin" / "python"
    for module in ("orchestrator", "orchestrator_image", "orchestrator_sensor"):
        absent = subprocess.run(
            [python, "-I", "-c", f"import {module}"], capture_output=True, text=True, check=False, cwd="/"
        )
        assert f"No module named '{module}'" in absent.stderr, absent.stderr
    return str(python)
