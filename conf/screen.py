"""What a configuration may not hold: anything that could run code or read the environment.

Hydra instantiates parts of its own configuration, so its overrides and the files of `--config-dir`
are looked at before it sees them. Settings are names, numbers and lists of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from conf.exits import Exit, Stop


def screen(tree: Any, origin: str = "") -> None:
    """Refuse keys that start with an underscore (`_target_`) and resolvers (`${oc.env:…}`).

    Args:
        tree: nested mappings and lists, interpolations not resolved.
        origin: stands before the setting's name in the message.

    Raises:
        Stop: (`CONFIG`) naming the setting.
    """
    for path, value in _nodes(tree):
        setting = origin + ".".join(path)
        # hydra.searchpath would bring in files that nobody screened
        if path and (path[-1].startswith("_") or path[-1] == "searchpath"):
            raise Stop(Exit.CONFIG, f"{setting} is not accepted: a setting is a name or a number, never code")
        # a resolver's name may itself be interpolated, so any colon after `${` counts
        if isinstance(value, str) and ":" in value.partition("${")[2]:
            raise Stop(
                Exit.CONFIG, f"{setting} is {value!r}; only plain references such as ${{seed}} are accepted"
            )


def screen_overrides(overrides: Sequence[str]) -> None:
    """Refuse what `screen` refuses in command-line overrides, those of `hydra.*` among them.

    Raises:
        Stop: (`CONFIG`) naming the setting.
    """
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value: Any = override.value()
        if isinstance(value, ChoiceSweep):
            value = list(value.list)
        tree: Any = value
        for part in reversed(override.key_or_group.replace("/", ".").split(".")):
            tree = {part: tree}
        screen(tree)


def screen_folder(folder: Path) -> None:
    """Refuse what `screen` refuses in every YAML file below `folder`.

    Raises:
        Stop: (`CONFIG`) naming file and setting, or the file that is no YAML.
    """
    for file in sorted(folder.rglob("*.yaml")):
        try:
            screen(yaml.safe_load(file.read_text(encoding="utf-8")), origin=f"{file}: ")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise Stop(Exit.CONFIG, f"{file} is not YAML: {' '.join(str(error).split())}") from None


def _nodes(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every node below `tree`, with the keys that lead to it."""
    yield path, tree
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _nodes(value, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _nodes(value, path)
