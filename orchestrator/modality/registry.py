"""Entry points -> modalities, each loaded when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from pydantic import BaseModel

from orchestrator.errors import PluginError, did_you_mean
from orchestrator.modality.contract import BackboneRules, Modality

GROUP = "orchestrator.modalities"

_registered: dict[str, Modality] = {}
_loaded: dict[str, Modality] = {}


@dataclass(frozen=True)
class Listing:
    """One line of `orchestrator plugins`."""

    name: str
    distribution: str
    version: str
    modality: Modality | None
    error: str


def register(modality: Modality) -> Modality:
    """Make a modality known in this process, for a notebook. The same rules as for an entry point."""
    validate(modality, "register()")
    if claims(modality.name):
        raise PluginError(
            f"the modality {modality.name!r} is taken by {owners(claims(modality.name))}",
            mend="give yours another name",
        )
    # Registering the same name again is how a notebook works: the newest cell wins, in this process alone.
    _registered[modality.name] = modality
    return modality


def unregister(name: str) -> None:
    """Take back a `register`."""
    _registered.pop(name, None)


def is_registered(name: str) -> bool:
    """Whether it came through `register`, so that other processes do not know it."""
    return name in _registered


def names() -> list[str]:
    """Every modality that is known, broken ones too."""
    return sorted({point.name for point in entry_points(group=GROUP)} | set(_registered))


def get(name: str) -> Modality:
    """The modality of that name. Raises `PluginError` where there is none, two, or a broken one."""
    if name in _registered:
        return _registered[name]
    if name in _loaded:
        return _loaded[name]
    points = claims(name)
    if not points:
        raise PluginError(
            f"there is no modality {name!r}",
            expected="one of " + ", ".join(names()),
            mend=did_you_mean(name, names()) or "pip install the distribution that brings it, or correct the name",
        )
    if len(points) > 1:
        raise PluginError(
            f"{len(points)} distributions claim the modality {name!r}: {owners(points)}",
            mend="uninstall all of them but one",
        )
    _loaded[name] = _load(points[0])
    return _loaded[name]


def available() -> dict[str, Modality]:
    """Every modality that loads; broken ones are left out (`listings` names them)."""
    modalities: dict[str, Modality] = {}
    for name in names():
        try:
            modalities[name] = get(name)
        except PluginError:
            continue
    return modalities


def listings() -> list[Listing]:
    """Every claim to a name, with the error of those that do not load."""
    rows = []
    for name in sorted({point.name for point in entry_points(group=GROUP)}):
        points = claims(name)
        for point in points:
            modality, error = None, ""
            try:
                modality = get(name)
            except PluginError as problem:
                error = problem.message
            dist = point.dist
            rows.append(Listing(name, dist.name if dist else "?", dist.version if dist else "?", modality, error))
    for name, modality in sorted(_registered.items()):
        rows.append(Listing(name, "register()", "", modality, ""))
    return rows


def distribution_of(name: str) -> str:
    """The distribution that brings a modality; `register()` where a program did."""
    if name in _registered:
        return "register()"
    return next((point.dist.name for point in claims(name) if point.dist), "?")


def claims(name: str) -> list[EntryPoint]:
    """The entry points of that name: more than one where distributions disagree."""
    return list(entry_points(group=GROUP, name=name))


def owners(points: list[EntryPoint]) -> str:
    """The distributions of entry points, for a message."""
    return " and ".join(sorted(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points))


def _load(point: EntryPoint) -> Modality:
    try:
        modality = point.load()
    except Exception as error:
        raise PluginError(
            f"the plugin {point.name!r} of {owners([point])} does not import: {type(error).__name__}: {error}",
            mend="mend or uninstall that distribution",
        ) from error
    validate(modality, point.value)
    if modality.name != point.name:
        raise PluginError(
            f"the entry point {point.name!r} of {owners([point])} gives a modality named {modality.name!r}",
            expected="one name in both places",
            mend="correct the entry point, or Modality(name=...)",
        )
    return modality  # type: ignore[no-any-return]  # validate has looked at it


def validate(modality: object, where: str) -> None:
    """Return if it is a modality that the registry takes; raise `PluginError` otherwise. `where` begins the message."""
    if not isinstance(modality, Modality):
        raise PluginError(
            f"{where} is a {type(modality).__name__}",
            expected="an orchestrator.Modality",
            mend="give the Modality itself",
        )
    if not modality.name.isidentifier() or modality.name != modality.name.lower():
        raise PluginError(
            f"{where}: the name {modality.name!r}", expected="a lower-case identifier", mend="choose another name"
        )
    if not modality.sample:
        raise PluginError(
            f"{where}: a modality without a sample field",
            expected="at least one SampleField",
            mend="say what a sample is: sample=(SampleField(...),)",
        )
    if not (isinstance(modality.settings, type) and issubclass(modality.settings, BaseModel)):
        raise PluginError(
            f"{where}: settings is no pydantic model",
            expected="a subclass of pydantic.BaseModel",
            mend='make it: class Settings(BaseModel, extra="forbid")',
        )
    if modality.settings.model_config.get("extra") != "forbid":
        raise PluginError(
            f"{where}: settings would take unknown keys in silence",
            expected='extra="forbid"',
            mend='class Settings(BaseModel, extra="forbid")',
        )
    if not isinstance(modality.rules, BackboneRules):
        raise PluginError(
            f"{where}: rules is a {type(modality.rules).__name__}",
            expected="BackboneRules",
            mend="make it: BackboneRules(generated_from=..., accepts=...)",
        )
    if not modality.tasks:
        raise PluginError(
            f"{where}: no task",
            expected="at least one Task",
            mend='say what can be predicted: tasks=(Task(name="single-label", title=...),)',
        )
