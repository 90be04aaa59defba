"""Draw docs/wings.svg: the wings in the order of the linter's contract, what each is for, and which imports which.

    python scripts/draw_wings.py            # writes docs/wings.svg
    python scripts/draw_wings.py --check    # exit 1 if it would change

An arrow from one wing to another is an import that stands in the code. One that other arrows lead to as well is left
out: almost every wing imports `job` and `errors`.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "orchestrator"
PICTURE = REPOSITORY / "docs" / "wings.svg"

WIDTHS = {1: 400, 2: 340, 3: 282}
"""Of a box, in pixels, by the number of boxes on its floor."""
LANE = 26  # what an arrow takes that passes a floor by
GAP = 18
FLOOR_GAP = 30
NAME_SIZE, TEXT_SIZE, LINE = 15, 12, 15
CHARACTER = 6.6  # pixels, on average, of a letter in TEXT_SIZE
MARGIN = 8
STRAIGHT = 8
"""How much more a lane's places hold together than boxes and arrows do."""
CENTRED = 3
"""How much a box is drawn to the middle, one arrow being 1."""
ROUNDS = 40

STYLE = """
.box { fill: #f6f8fa; stroke: #57606a; }
.name { fill: #1f2328; font-weight: 600; }
.text { fill: #424a53; }
.arrow { fill: none; stroke: #848d97; stroke-width: 1.5; }
.head { fill: #848d97; }
@media (prefers-color-scheme: dark) {
  .box { fill: #161b22; stroke: #848d97; }
  .name { fill: #f0f6fc; }
  .text { fill: #c9d1d9; }
}
"""


@dataclass(eq=False)
class Node:
    """A wing on its floor; or, without text, the place where arrows to a lower wing pass a floor by."""

    name: str
    width: float
    text: Sequence[str] = ()
    x: float = 0.0
    """Of its middle."""
    below: list[Node] = field(default_factory=list)
    above: list[Node] = field(default_factory=list)


def floors() -> list[list[str]]:
    """The wings' names, top floor first, as the contract of import-linter has them."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one.get("exhaustive")]
    return [line.split(" | ") for line in layers]


def files_of(wing: str) -> list[Path]:
    """A wing's modules, its door first; or the one module that stands without a folder."""
    folder = PACKAGE / wing
    return sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{wing}.py"]


def imports_of(wing: str, names: set[str]) -> set[str]:
    """The wings that a wing imports; what only a type checker imports is none."""
    found = set()
    for file in files_of(wing):
        for node in _statements(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [one.name for one in node.names]
            else:
                continue
            found |= {name.split(".")[1] for name in modules if name.startswith("orchestrator.")}
    return (found & names) - {wing}


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _statements(child)


def reduced(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports without those that others lead to as well."""

    @functools.cache
    def reached(wing: str) -> frozenset[str]:
        return frozenset(imports[wing]).union(*(reached(one) for one in imports[wing]))

    return {
        wing: {one for one in below if not any(one in reached(other) for other in below - {one})}
        for wing, below in imports.items()
    }


def described(wing: str, width: float) -> list[str]:
    """The first line of the wing's docstring, in lines that fit into a box."""
    first = ast.get_docstring(ast.parse(files_of(wing)[0].read_text(encoding="utf-8"))) or ""
    first = first.splitlines()[0].replace("`", "").removesuffix(".")
    return textwrap.wrap(first, int((width - 2 * MARGIN) / CHARACTER))


def placed() -> list[list[Node]]:
    """The floors with their boxes, and with a place on each floor that arrows pass by; all have their x."""
    names = floors()
    floor_of = {name: i for i, line in enumerate(names) for name in line}
    arrows = reduced({name: imports_of(name, set(floor_of)) for name in floor_of})
    rows = [[Node(name, WIDTHS[len(line)], described(name, WIDTHS[len(line)])) for name in line] for line in names]
    boxes = {node.name: node for row in rows for node in row}
    lanes: dict[tuple[str, int], Node] = {}

    def towards(target: str, floor: int) -> Node:
        """The box itself on its own floor, on those above the lane that leads to it."""
        if floor == floor_of[target]:
            return boxes[target]
        if (target, floor) not in lanes:
            lanes[target, floor] = Node(target, LANE)
            rows[floor].append(lanes[target, floor])
            _join(lanes[target, floor], towards(target, floor + 1))
        return lanes[target, floor]

    for name, targets in arrows.items():
        for target in sorted(targets, key=lambda one: (floor_of[one], one)):
            _join(boxes[name], towards(target, floor_of[name] + 1))
    _settle(rows)
    return rows


def _join(upper: Node, lower: Node) -> None:
    upper.below.append(lower)
    lower.above.append(upper)


def _settle(rows: list[list[Node]]) -> None:
    """Give every node its x: near what it is joined to, and apart from its neighbours."""
    for row in rows:
        _spread(row, [0.0] * len(row))
    for turn in range(ROUNDS):
        for row in rows if turn % 2 == 0 else rows[::-1]:
            wanted = {node: _wanted(node) for node in row}
            if turn < ROUNDS // 2:
                row.sort(key=wanted.__getitem__)
            _spread(row, [wanted[node] for node in row])


def _wanted(node: Node) -> float:
    """The middle of what a node is joined to. A box is drawn to the picture's middle too; a lane is straight."""
    joined = [*node.above, *node.below]
    weights = [1 if node.text or one.text else STRAIGHT for one in joined]
    total = sum(one.x * weight for one, weight in zip(joined, weights, strict=True))
    return total / (sum(weights) + (CENTRED if node.text else 0))


def _spread(row: Sequence[Node], wanted: Sequence[float]) -> None:
    """The places nearest to the wanted ones (least squares) at which neighbours keep their distance."""
    offsets = [0.0]
    for left, right in itertools.pairwise(row):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    blocks: list[tuple[float, int, int]] = []  # neighbours that press against each other: place, weight, how many
    for node, want, offset in zip(row, wanted, offsets, strict=True):
        place, weight, num = want - offset, 1 if node.text else STRAIGHT, 1
        while blocks and blocks[-1][0] > place:
            before, heavy, count = blocks.pop()
            place = (place * weight + before * heavy) / (weight + heavy)
            weight, num = weight + heavy, num + count
        blocks.append((place, weight, num))
    starts = [place for place, _, num in blocks for _ in range(num)]
    for node, start, offset in zip(row, starts, offsets, strict=True):
        node.x = start + offset


def draw() -> str:
    """The picture."""
    rows = placed()
    left = min(node.x - node.width / 2 for row in rows for node in row) - MARGIN
    width = max(node.x + node.width / 2 for row in rows for node in row) + MARGIN - left
    tops, heights, y = [], [], float(MARGIN)
    for row in rows:
        tops.append(y)
        heights.append(2 * MARGIN + NAME_SIZE + LINE * max(len(node.text) for node in row))
        y += heights[-1] + FLOOR_GAP
    for node in (node for row in rows for node in row):
        node.x -= left
    boxes, lines = [], []
    for row, top, height in zip(rows, tops, heights, strict=True):
        for node in row:
            if node.text:
                boxes += _box(node, top, height)
            start = top + height if node.text else top
            for lower in node.below:
                lines.append(_arrow(_port(node, node.below, lower), start, top + height, lower, node))
    height = y - FLOOR_GAP + MARGIN
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="system-ui, Helvetica, Arial, sans-serif" role="img" '
            'aria-label="The wings of orchestrator, top floor first: a wing imports those below it.">',
            "<!-- Made by scripts/draw_wings.py from the code. -->",
            f"<style>{STYLE}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
            'markerUnits="userSpaceOnUse"><path class="head" d="M0 0L8 4L0 8Z"/></marker>',
            *lines,
            *boxes,
            "</svg>\n",
        )
    )


def _box(node: Node, top: float, height: float) -> list[str]:
    x = node.x - node.width / 2
    baseline, num = top + MARGIN + NAME_SIZE - 2, len(files_of(node.name)) - 1
    title, size = (f"{node.name}/", f"{num} modules") if num else (f"{node.name}.py", "")
    return [
        f'<rect class="box" x="{x:.0f}" y="{top:.0f}" width="{node.width:.0f}" height="{height:.0f}" rx="6"/>',
        f'<text class="name" x="{x + MARGIN:.0f}" y="{baseline:.0f}" font-size="{NAME_SIZE}">{title}</text>',
        f'<text class="text" x="{x + node.width - MARGIN:.0f}" y="{baseline:.0f}" font-size="{TEXT_SIZE}" '
        f'text-anchor="end">{size}</text>',
        *(
            f'<text class="text" x="{x + MARGIN:.0f}" y="{baseline + LINE * (i + 1) + 2:.0f}" '
            f'font-size="{TEXT_SIZE}">{escape(line, quote=False)}</text>'
            for i, line in enumerate(node.text)
        ),
    ]


def _port(node: Node, joined: Sequence[Node], other: Node) -> float:
    """Where an arrow leaves a box or reaches it: apart from the box's other arrows, in the order of their far ends."""
    if not node.text:
        return node.x
    place = sorted(joined, key=lambda one: one.x).index(other)
    return node.x + (place - (len(joined) - 1) / 2) * LANE


def _arrow(x: float, y: float, bottom: float, lower: Node, upper: Node) -> str:
    """From (x, y), straight down to the floor's `bottom`, then over to the top of what is below."""
    end, below = _port(lower, lower.above, upper), bottom + FLOOR_GAP
    middle = (bottom + below) / 2
    head = ' marker-end="url(#head)"' if lower.text else ""
    return (
        f'<path class="arrow" d="M{x:.0f} {y:.0f}V{bottom:.0f}C{x:.0f} {middle:.0f} {end:.0f} {middle:.0f} '
        f'{end:.0f} {below:.0f}"{head}/>'
    )


def main() -> None:
    """Write the picture, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the picture would change")
    picture = draw()
    if not parser.parse_args().check:
        PICTURE.write_text(picture, encoding="utf-8")
    elif not PICTURE.exists() or PICTURE.read_text(encoding="utf-8") != picture:
        sys.exit("docs/wings.svg is not what the code says: make picture")


if __name__ == "__main__":
    main()
