"""What is asked for: attribute=value pairs, the two levels they stand at, and a second look at what comes.

An archive may ignore a key that it does not know (PS3.4 C.2.2.1): a look at its answers keeps the rest of
the archive where it is.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from conf.exits import Exit, Stop

Level = Literal["STUDY", "SERIES", "IMAGE"]
Attributes = Mapping[str, str]

_UID = r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*"
_DATE = r"\d{8}|\d{8}-(\d{8})?|-\d{8}"
_TEXT = r"[^\\,\x00-\x1f]{1,64}"

#: keys of a query: what their values look like, by level (PS3.4 C.6.2.1)
KEYS: Mapping[Level, Mapping[str, str]] = {
    "STUDY": {
        "PatientID": _TEXT,
        "StudyInstanceUID": _UID,
        "StudyDate": _DATE,
        "AccessionNumber": _TEXT,
        "StudyDescription": _TEXT,
    },
    "SERIES": {
        "Modality": r"[A-Z]{1,16}",
        "SeriesInstanceUID": _UID,
        "SeriesDescription": _TEXT,
        "BodyPartExamined": _TEXT,
    },
}


def uid(text: str) -> str:
    """`text`, a UID that may stand in a path of a URL.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(_UID, text):
        raise ValueError(f"{text[:80]!r} is not a UID")
    return text


@dataclass(frozen=True)
class Query:
    """Accepted values by key, at each level: one of each key's values has to match."""

    study: Mapping[str, tuple[str, ...]]
    series: Mapping[str, tuple[str, ...]]

    def asked(self, level: Level) -> Iterator[dict[str, str]]:
        """The matching keys of each request: one value of each."""
        keys = self.study if level == "STUDY" else self.series
        for values in itertools.product(*keys.values()):
            yield dict(zip(keys, values, strict=True))

    def matches(self, level: Level, found: Attributes) -> bool:
        """Whether what an archive found is what was asked for.

        Raises:
            Stop: (`PACS_REFUSED`) the archive does not answer a key, so that nobody can tell.
        """
        keys = self.study if level == "STUDY" else self.series
        for key, values in keys.items():
            if key not in found:
                text = f"the archive does not answer {key}: what it finds cannot be checked; leave {key} out"
                raise Stop(Exit.PACS_REFUSED, text)
            if not any(_matches(key, value, found[key]) for value in values):
                return False
        return True


def parse(texts: Sequence[str]) -> Query:
    """`Modality=CT,RTSTRUCT`, `StudyDate=20240101-20240630` and the like.

    Raises:
        Stop: (`CONFIG`) no pair at all, an unknown key, or a value that it cannot have.
    """
    if not texts:
        raise Stop(Exit.CONFIG, f"no query: the whole archive is never pulled; {_accepted()}")
    levels: dict[Level, dict[str, tuple[str, ...]]] = {"STUDY": {}, "SERIES": {}}
    for text in texts:
        key, equals, value = text.partition("=")
        level = next((level for level, keys in KEYS.items() if key in keys), None)
        if level is None or not equals:
            raise Stop(Exit.CONFIG, f"query {text!r}: {_accepted()}")
        if key in levels[level]:
            raise Stop(Exit.CONFIG, f"query gives {key} twice; write {key}=A,B")
        values = tuple(value.split(","))
        for one in values:
            if not re.fullmatch(KEYS[level][key], one):
                raise Stop(Exit.CONFIG, f"query {text!r}: {one!r} is no value of {key}; {_ACCEPTED[key]}")
        levels[level][key] = values
    return Query(levels["STUDY"], levels["SERIES"])


_ACCEPTED = {
    key: "want 20240131, 20240101-20240630, 20240101- or -20240630"
    if pattern == _DATE
    else "want digits and dots"
    if pattern == _UID
    else "want capital letters, as in CT"
    if key == "Modality"
    else "want 1 to 64 characters; * and ? are wildcards"
    for keys in KEYS.values()
    for key, pattern in keys.items()
}


def _accepted() -> str:
    return f"accepted is KEY=VALUE[,VALUE…] with {', '.join(_ACCEPTED)}"


def _matches(key: str, wanted: str, got: str) -> bool:
    """PS3.4 C.2.2.2: single value, range and wildcard; case counts for nothing here, as at many archives."""
    if key == "StudyDate":
        low, dash, high = wanted.partition("-")
        return (low if dash else wanted) <= got <= ((high or "99999999") if dash else wanted) and bool(got)
    pattern = wanted.strip().lower().replace("[", "[[]")
    return fnmatch.fnmatchcase(got.strip().lower(), pattern)
