"""The code that a job needs, as packages for the nodes: this distribution, and the one that brings the modality.

Each is the content of its wheel. What is installed here is put together from its RECORD; what is installed in place
(`pip install -e`), or is only on the path, is built from its sources, which are those that run here. The nodes unpack
it onto their path and install nothing, so that no index is asked and entry points are found; what it requires must be
there already, and the preflight looks. Never the working directory.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement  # the Hub's client brings it

from orchestrator.distributed.nodes import contents_digest, is_code
from orchestrator.distributed.request import write_zip
from orchestrator.errors import PluginError
from orchestrator.modality import registry

_OURS = "orchestrator"
_LEFT_OUT = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
"""Of a dist-info: what says how and from where it was installed here, a URL with a password perhaps."""
_BUILD = """
import importlib, sys
sys.path[:0] = sys.argv[3:]
module, _, part = sys.argv[1].partition(":")
backend = importlib.import_module(module)
for name in filter(None, part.split(".")):
    backend = getattr(backend, name)
backend.build_wheel(sys.argv[2])
"""


@dataclass(frozen=True)
class Delivery:
    """A distribution as it travels."""

    name: str
    version: str
    contents: Mapping[str, bytes]
    """By their paths below a folder of the path."""
    requires: tuple[str, ...]
    """What it needs beside itself, extras resolved: `torch>=2.9`, with the markers of other Pythons."""

    @cached_property
    def modules(self) -> dict[str, str]:
        """Top-level module or package -> digest of its code."""
        tops: dict[str, dict[str, bytes]] = {}
        for name, content in self.contents.items():
            top, is_inside, _ = name.partition("/")
            if not is_inside:
                top = top.partition(".")[0] if top.endswith((".py", *EXTENSION_SUFFIXES)) else ""
            if top.isidentifier() and is_code(name):  # the others are no modules: NAME.libs, NAME.dist-info
                tops.setdefault(top, {})[name] = content
        return {top: contents_digest(part) for top, part in sorted(tops.items())}

    @property
    def digest(self) -> str:
        """Of all of its code."""
        return contents_digest({name: digest.encode() for name, digest in self.modules.items()})

    def write(self, folder: Path) -> Path:
        """The package's file."""
        file = folder / f"{self.name}-{self.version}.zip"
        write_zip(file, self.contents)
        return file


def deliveries(modality: str, libraries: Collection[str] = ()) -> list[Delivery]:
    """What the nodes need to import this package and a modality. Raises `PluginError` for what cannot be delivered.

    `libraries`: names of those that this job needs of all that are optional, `peft`.
    """
    if registry.is_registered(modality):
        raise PluginError(
            f"the modality {modality!r} was registered by this program alone, and the cluster cannot import it",
            expected="a distribution that brings it, as docs/plugins.md shows",
            mend="put it into a package with a pyproject.toml, and pip install -e it here",
        )
    registry.get(modality)
    extra = registry.get(modality).extra
    (point,) = entry_points(group=registry.GROUP, name=modality)
    ours = own_delivery(extra, libraries)
    if point.dist is None or point.dist.name == _OURS:
        return [ours]
    return [ours, _delivery(point.dist, point.module, set())]


def own_delivery(extra: str = "", libraries: Collection[str] = ()) -> Delivery:
    """This distribution, with what its training and one of its extras require, and these libraries of all extras."""
    return _delivery(distribution(_OURS), _OURS, {"train", extra}, libraries)


def _delivery(dist: Distribution, module: str, extras: set[str], libraries: Collection[str] = ()) -> Delivery:
    contents = _contents(dist, module.split(".")[0])
    version = dist.version
    for name, content in contents.items():
        if name.endswith(".dist-info/METADATA"):
            found = re.search(rb"^Version: (.+)$", content, re.MULTILINE)
            version = found[1].decode().strip() if found else version
    return Delivery(dist.name, version, contents, tuple(_requires(dist, extras, libraries)))


# --- what a wheel holds ---


def _contents(dist: Distribution, module: str) -> dict[str, bytes]:
    """{path: content} of the wheel of the code that runs here."""
    found = importlib.util.find_spec(module)
    if found is None:
        raise PluginError(f"{dist.name} has no module {module}", mend=f"install it again: pip install {dist.name}")
    places = [*(found.submodule_search_locations or []), found.origin or ""]
    running = Path(places[0]).resolve()
    recorded = {Path(str(dist.locate_file(file))).resolve(): file for file in dist.files or []}
    inside = running in recorded or any(running in file.parents for file in recorded)
    if inside:
        contents = {str(file): where.read_bytes() for where, file in recorded.items() if where.is_file()}
        return dict(_unpacked(contents.items()))
    root = _source_of(running, dist.name)
    with tempfile.TemporaryDirectory(prefix="orchestrator-wheel-") as folder:
        wheel = _built(root, Path(folder), dist.name)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            return dict(_unpacked((name, archive.read(name)) for name in names))


def _unpacked(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    """The files where an installer puts them; without scripts, and without what is of this machine alone."""
    for name, content in files:
        parts = PurePosixPath(name).parts
        if parts[0].endswith(".data") and len(parts) > 2:
            if parts[1] not in ("purelib", "platlib"):
                continue
            parts = parts[2:]
        if ".." in parts or parts[0] == "/" or not is_code(name) or parts[-1].endswith(".pth"):
            continue
        if parts[0].endswith(".dist-info") and parts[-1] in _LEFT_OUT:
            continue
        yield "/".join(parts), content


def _source_of(running: Path, name: str) -> Path:
    """The folder of the sources that this code lies in, by its pyproject.toml."""
    for folder in running.parents:
        file = folder / "pyproject.toml"
        if file.is_file():
            with file.open("rb") as text:
                project = tomllib.load(text).get("project", {}).get("name", "")
            if _plain(project) == _plain(name):
                return folder
    raise PluginError(
        f"{name} runs from {running}, where there is no pyproject.toml of that name: it cannot be delivered",
        expected="a distribution that is installed, or its sources",
        mend=f"pip install {name}, or put its pyproject.toml beside the code",
    )


def _built(root: Path, folder: Path, name: str) -> Path:
    """The wheel of these sources: by their own build backend, where it is here, else by pip in an environment apart."""
    with (root / "pyproject.toml").open("rb") as text:
        system = tomllib.load(text).get("build-system", {})
    backend = system.get("build-backend", "setuptools.build_meta:__legacy__")
    paths = [str(root / path) for path in system.get("backend-path", [])]
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    said = ""
    for command in (
        [sys.executable, "-c", _BUILD, backend, str(folder), *paths],
        [*pip, "--wheel-dir", str(folder), str(root)],
    ):
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace", check=False)
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
    raise PluginError(
        f"{name} in {root} cannot be built as a wheel: {said}", expected="sources that `pip wheel` takes",
        mend=f"look at: pip wheel --no-deps {root}",
    )  # fmt: skip


# --- what it requires ---


def _requires(dist: Distribution, extras: set[str], libraries: Collection[str] = ()) -> list[str]:
    """Requirements of a distribution with these extras, those of its own name followed; each once.

    `libraries`: those of that name too, whatever extra has them.
    """
    found: dict[str, None] = {}
    done: set[tuple[str, str]] = set()
    open_: list[tuple[Distribution, set[str]]] = [(dist, extras)]
    while open_:
        one, wanted = open_.pop()
        for text in one.requires or []:
            need = Requirement(text)
            marker = str(need.marker or "")
            has_part = need.name in libraries or "extra" not in marker
            if not has_part and not any(need.marker.evaluate({"extra": name}) for name in wanted):  # type: ignore[union-attr]
                continue
            if _plain(need.name) in (_OURS, _plain(one.name)):
                key = (_plain(need.name), ",".join(sorted(need.extras)))
                if key not in done:
                    done.add(key)
                    open_.append((_known(need.name, one), set(need.extras)))
                continue
            need.marker = None if "extra" in marker else need.marker
            found[str(need)] = None
    return sorted(found)


def _known(name: str, otherwise: Distribution) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return otherwise


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def as_wanted(several: Iterable[Delivery]) -> dict[str, Any]:
    """What the preflight asks the nodes about deliveries."""
    several = list(several)
    return {
        "modules": {top: digest for one in several for top, digest in one.modules.items()},
        "requires": sorted({text for one in several for text in one.requires}),
        "delivered": [{"name": one.name, "version": one.version, "digest": one.digest} for one in several],
    }
