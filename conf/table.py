"""The four extension tables: a name, and where its code stands. Importing a table imports none of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, validate_call

from conf.exits import Exit, Stop
from conf.schema import Section, complaint


class Table(Mapping[str, Any]):
    """Lower-case names to classes or builder functions of this project, loaded when first used.

    The targets are literals of our own source: a name that comes from outside is only looked up,
    so no code path ever crosses the wire.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        """The class or builder called `name`.

        Raises:
            Stop: (`UNKNOWN_NAME`) with the known names.
        """
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise Stop(Exit.UNKNOWN_NAME, f"{self.kind} is {name!r}; known: {known} (setting: {self.kind})")
        module, _, attribute = self._entries[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def build(self, section: Section, **given: Any) -> Any:
        """Build the entry `section` names, from its parameters and from `given`.

        Parameters are checked against the entry's own annotations; unknown ones are refused.

        Raises:
            Stop: (`UNKNOWN_NAME`, `CONFIG`) naming the setting, what was given and what is accepted.
        """
        entry = self[section.name]
        values = {**section.parameters, **given}
        try:
            if is_dataclass(entry):
                adapter: TypeAdapter[Any] = TypeAdapter(entry)
                return adapter.validate_python(values)
            return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(entry)(**values)
        except ValidationError as error:
            # pydantic wraps what a constructor raises; an entry that builds from other tables keeps its code
            cause = error.errors()[0].get("ctx", {}).get("error")
            if isinstance(cause, Stop):
                raise cause from None
            raise Stop(Exit.CONFIG, complaint(error, prefix=f"{self.kind}.")) from None


#: for `__pydantic_config__` of the frozen dataclasses that stand in a table
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
