"""Write docs/settings.md: every setting of a job and of the built-in modalities, out of their models.

python scripts/write_settings.py            # writes docs/settings.md
python scripts/write_settings.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "plugins")]

from orchestrator.job import Setting, job_reference, settings_of  # noqa: E402
from orchestrator.modality import registry  # noqa: E402

PAGE = REPOSITORY / "docs" / "settings.md"
BUILT_IN = ("image", "audio", "text")
HEAD = """\
# The settings

This page is written by `scripts/write_settings.py` from the models that check a job; `orchestrator settings [GROUP]`
prints the same. A job file has the groups as they stand here, or `GROUP.KEY: value`; on the command line
`--set GROUP.KEY=VALUE` sets any of them, from Python `finetune(**{"GROUP.KEY": value})`. The name of a setting that one
group alone has will do without its group (`epochs: 3`, `finetune(epochs=3)`), and so will one of the modality's own
(`size: 64`). Where a default stands in the meaning, the plan shows what it comes to.

```yaml
backbone: microsoft/resnet-50
data:
  path: photos/
  on_bad_sample: skip
training:
  epochs: 5
settings:
  size: 64
```
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, several in job_reference().items():
        parts += [f"## {'The job itself' if name == 'job' else f'`{name}`'}", "", *rows(several), ""]
    for name in BUILT_IN:
        parts += [f"## `settings` of the modality {name}", "", *rows(settings_of(registry.get(name).settings)), ""]
    return "\n".join(parts).rstrip() + "\n"


def rows(several: Sequence[Setting]) -> list[str]:
    lines = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    for one in several:
        cells = (f"`{one.key}`", one.takes, f"`{one.default}`" if one.default else "", one.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE.relative_to(REPOSITORY)} is not what the models say: make settings", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
