"""What a node of the cluster has: run on each of them before a job. Standard library alone, until more is known there.

Each question is answered by itself, with the error where it has none: a node that lacks one thing is told with all that
it lacks.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def look(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """{what: facts} of this node; `wanted` is the request of the preflight.

    Facts that could not be had are {"error": why}.
    """
    return {
        "hostname": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "ray": _told(lambda: _version("ray")),
        "torch": _told(lambda: _version("torch")),
        "lacking": _told(lambda: _lacking(wanted["requires"])),
        "code": {name: _told(lambda name=name: module_digest(name)) for name in wanted["modules"]},  # type: ignore[misc]
        "modality": _told(lambda: _loads(wanted["modality"])),
        "storage": _told(lambda: _exchange(wanted["storage"], wanted["token"], wanted["node_id"])),
        "free_bytes": _told(lambda: _free_bytes(wanted["storage"])),
        "cache_free_bytes": _told(lambda: _free_at(_hub_cache())),
        "one_disk": _told(lambda: _is_one_disk(wanted["storage"])),
        "data": {place: _told(lambda place=place: describe(place)) for place in wanted["data"]},  # type: ignore[misc]
        "backbones": {one["source"]: _told(lambda one=one: _backbone(one)) for one in wanted["backbones"]},  # type: ignore[misc]
        "memory_bytes": _told(_memory_bytes),
        "gpus": _told(_gpus),
    }


def _told(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:  # whatever it is, it is the answer
        text = (str(error).strip().splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {text}".removesuffix(": ")}


# --- code ---


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def _lacking(requires: list[str]) -> list[str]:
    """Requirements that this node does not meet, with what it has."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    lacking = []
    for text in requires:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        shown = f"{wanted.name}{wanted.specifier}"
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            lacking.append(shown)
            continue
        if not wanted.specifier.contains(there, prereleases=True):
            lacking.append(f"{shown} (it has {there})")
    return lacking


def module_digest(name: str) -> str:
    """A digest of the code of a top-level module or package, as it would be imported here."""
    found = importlib.util.find_spec(name)
    if found is None:
        raise ModuleNotFoundError(f"there is no module {name}")
    places = list(found.submodule_search_locations or [])
    if not places:
        return contents_digest({Path(str(found.origin)).name: Path(str(found.origin)).read_bytes()})
    root = Path(places[0])
    return contents_digest({
        f"{name}/{file.relative_to(root).as_posix()}": file.read_bytes()
        for file in root.rglob("*") if file.is_file() and is_code(file.as_posix())
    })  # fmt: skip


def is_code(name: str) -> bool:
    """Whether a file of a package is one that somebody wrote."""
    return "__pycache__" not in name and not name.endswith(".pyc")


def contents_digest(contents: Mapping[str, bytes]) -> str:
    """Twelve hex digits of {name: content}."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{hashlib.sha256(contents[name]).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _loads(modality: str) -> str:
    """The distribution of a modality that loads here."""
    from orchestrator.modality import registry

    registry.get(modality)
    return registry.distribution_of(modality)


# --- places ---


def write_token(storage: str, name: str, content: bytes) -> None:
    """Write a small file below the storage; for others to read."""
    place = _place(storage, name)
    if isinstance(place, Path):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    else:
        place.write(content)


def read_token(storage: str, name: str) -> bytes:
    """What somebody wrote there. Raises `OSError`."""
    place = _place(storage, name)
    return place.read_bytes() if isinstance(place, Path) else bytes(place.read())


def remove_tokens(storage: str, token: str) -> None:
    """Leave nothing behind."""
    place = _place(storage, f"{_folder(token)}/x")
    if isinstance(place, Path):
        shutil.rmtree(place.parent, ignore_errors=True)
    else:
        place.parent().delete_folder()


def token_file(token: str, who: str) -> str:
    """Where `who` writes."""
    return f"{_folder(token)}/{who}"


def _folder(token: str) -> str:
    return f".preflight-{token}"


def _place(storage: str, name: str) -> Any:
    if "://" not in storage:
        return Path(storage) / name
    from orchestrator.data import cached

    return cached(storage).join(name)


def _exchange(storage: str, token: str, node_id: str) -> str:
    """Read what the head wrote on the storage, and write for it to read."""
    if read_token(storage, token_file(token, "head")) != token.encode():
        raise OSError("what the head wrote there reads otherwise here")
    write_token(storage, token_file(token, node_id), token.encode())
    return "written and read"


def _free_bytes(storage: str) -> int:
    return _free_at(_written_first(storage))


def _written_first(storage: str) -> Path:
    """Where the run is written to first: the storage itself, or this machine's copies of a bucket."""
    return Path(storage) if "://" not in storage else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _hub_cache() -> Path:
    """Where a backbone of the Hub is kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _is_one_disk(storage: str) -> bool:
    """Whether the run and what comes from the Hub share their room."""
    return _there(_written_first(storage)).stat().st_dev == _there(_hub_cache()).stat().st_dev


def _free_at(place: Path) -> int:
    return shutil.disk_usage(_there(place)).free


def _there(place: Path) -> Path:
    """The place, or what of the way to it is there already."""
    while not place.exists():
        place = place.parent
    return place


def describe(place: str) -> str:
    """What lies at a place of the data, in a digest of names and sizes: the same wherever the same is seen."""
    if "://" in place:
        from orchestrator.data import cached

        location = cached(place)
        if location.kind() == "directory":
            return contents_digest({name: b"folder" if folder else b"" for name, folder in location.children()})
        found = location.stat()
        if found is None:
            raise FileNotFoundError(f"there is no {place}")
        return contents_digest({place: str(found[0]).encode()})
    path = Path(place)
    if path.is_dir():
        return contents_digest({one.name: b"folder" if one.is_dir() else _size(one) for one in path.iterdir()})
    return contents_digest({path.name: _size(path)})


def _size(file: Path) -> bytes:
    return str(file.stat().st_size).encode()


def _backbone(wanted: Mapping[str, Any]) -> int:
    """Bytes of the backbone that this node has to download from the Hub. Raises where they are not to be had."""
    if wanted["path"]:
        for name, size in wanted["files"].items():
            file = Path(wanted["path"]) / name
            if not file.is_file():
                raise FileNotFoundError(f"there is no {file}")
            if file.stat().st_size != size:
                raise OSError(f"{file} has {file.stat().st_size} bytes, not {size}")
        return 0
    if "://" in wanted["source"]:
        from orchestrator.data import cached

        place = cached(f"{wanted['source'].rstrip('/')}/results.json")
        if place.stat() is None:
            raise FileNotFoundError(f"there is no finished run {wanted['source']}")
        return 0
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    repo_id, commit = wanted["repo_id"], wanted["commit"]
    coming = {
        name: size for name, size in wanted["files"].items()
        if not isinstance(try_to_load_from_cache(repo_id, name, revision=commit), str)
    }  # fmt: skip
    if coming:
        get_hf_file_metadata(hf_hub_url(repo_id, next(iter(coming)), revision=commit), timeout=20)
    return sum(coming.values())


# --- hardware ---


_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _memory_bytes() -> int:
    """Of the machine, or as much of it as this container may take."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _LIMITS):
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdecimal():  # else "max"
            memory = min(memory, int(text))
    return memory


def _gpus() -> list[int]:
    """The memory of each GPU in bytes, [] where there is none that nvidia-smi knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run(
        [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True,
        check=False, timeout=20,
    )  # fmt: skip
    return [int(line) * 2**20 for line in done.stdout.split() if line.isdigit()]
