"""What a check says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from client.sitefile import SiteFile


class Level(StrEnum):
    """How bad it is: a site with a problem will fail; one with a warning may be slow or fail later."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was seen, and what to do where it is not ok."""

    level: Level
    seen: str
    remedy: str = ""


Check = Callable[["SiteFile"], Finding]


def ok(seen: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, seen)


def warning(seen: str, remedy: str) -> Finding:
    """It works, but not well, or not for long, or nobody could tell."""
    return Finding(Level.WARNING, seen, remedy)


def problem(seen: str, remedy: str) -> Finding:
    """It will fail."""
    return Finding(Level.PROBLEM, seen, remedy)
