"""What stands in cluster/, against the definitions of those who read it: a key that they do not know is found."""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
import jsonschema

Path = tuple[str | int, ...]


def closed(schema: Any) -> Any:
    """The schema with no other properties than those that it names, wherever it names any."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    whole = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        whole.setdefault("additionalProperties", False)
    return whole


def problems(value: object, schema: Mapping[str, Any]) -> list[str]:
    """What is wrong with a value, with its place."""
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{'.'.join(map(str, one.absolute_path))}: {one.message}" for one in found]


def keys(value: object, at: Path = ()) -> Iterator[Path]:
    """The place of each key, however deep."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        if isinstance(value, dict):
            yield (*at, key)
        yield from keys(one, (*at, key))


def misspelt(value: Any, place: Path) -> Any:
    """A copy in which the key at that place has one letter more."""
    whole = copy.deepcopy(value)
    inside = whole
    for one in place[:-1]:
        inside = inside[one]
    inside[f"{place[-1]}x"] = inside.pop(place[-1])
    return whole


def unnoticed(value: Any, check: Callable[[Any], Sequence[str]], free: Sequence[str]) -> list[str]:
    """The places at which a misspelt key is not found; `free` (patterns of places): there any key is right."""
    names = {place: ".".join(map(str, place)) for place in keys(value)}
    return [
        name
        for place, name in names.items()
        if not any(re.fullmatch(one, name) for one in free) and not check(misspelt(value, place))
    ]


def ray_problems(text: str) -> list[str]:
    """What Ray's command line would say to the commands of it in a line of a shell. None of them is run."""
    from ray.scripts.scripts import cli

    found = []
    for words in split_commands(text):
        if words and words[0] == "ray":
            try:
                command = cli.get_command(click.Context(cli), words[1])
                if command is None:
                    found.append(f"ray has no command {words[1]}")
                else:
                    command.make_context(words[1], list(words[2:]))
            except click.ClickException as error:
                found.append(f"{' '.join(words)}: {error.format_message()}")
    return found


def split_commands(text: str) -> list[list[str]]:
    """The words of each command of a line of a shell; where a variable stands, 1."""
    lexer = shlex.shlex(re.sub(r"\$\{?\w+\}?", "1", text), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands
