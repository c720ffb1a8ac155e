"""Who a patient is at this site: a name under the site's own key, and those that must never come back."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic, write_new

_KEY = 32  # bytes


def patient_key(path: Path) -> bytes:
    """The 32-byte key that names patients: read from `path`, or made there (mode 0600) at first use.

    Raises:
        Stop: (`CONFIG`) the file is shorter than 32 bytes.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        if not path.exists():
            write_new(path, os.urandom(_KEY), mode=0o600)
    key = path.read_bytes()
    if len(key) < _KEY:
        raise Stop(
            Exit.CONFIG, f"key file {path} has {len(key)} bytes; need {_KEY}: restore it from a backup"
        )
    return key


def pseudonym(key: bytes, patient: str) -> str:
    """The patient's name at this site: 16 hex digits of HMAC-SHA-256 (RFC 2104) under the site's key.

    Args:
        patient: as the files or the manifest name the person.
    """
    return hmac.new(key, patient.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:16]


@dataclass(frozen=True)
class Barred:
    """Patients whom no ingest takes in again. The file lies beside the key, not in the cache: a cache
    may be removed and made anew.

    Attributes:
        names: pseudonyms. key: fingerprint of the key they were made with.
    """

    names: frozenset[str] = frozenset()
    key: str = ""

    @classmethod
    def read(cls, path: Path) -> Barred:
        """The list, empty where there is none.

        Raises:
            Stop: (`CONFIG`) it cannot be read: an ingest without it could bring a patient back.
        """
        try:
            data = json.loads(path.read_bytes())
            return cls(frozenset(map(str, data["barred"])), str(data["key"]))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError) as error:
            text = (
                f"{path} is not a list of barred patients ({type(error).__name__}); restore it from a backup"
            )
            raise Stop(Exit.CONFIG, text) from None

    def check(self, key: bytes) -> None:
        """Refuse another key: under it barred patients would have other names, and come back.

        Raises:
            Stop: (`CONFIG`).
        """
        if self.names and self.key != fingerprint(key):
            text = "the key that names patients is not the one under which patients were barred"
            raise Stop(Exit.CONFIG, f"{text}; restore patient.key, or their data would come back")

    def write(self, path: Path, more: Collection[str], key: bytes) -> Barred:
        """The list with more names, durably on disk (mode 0600)."""
        self.check(key)
        new = Barred(self.names | set(more), fingerprint(key))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with no_space(path, "repeat"):
            write_atomic(path, json.dumps({"barred": sorted(new.names), "key": new.key}).encode(), mode=0o600)
        return new


def fingerprint(key: bytes) -> str:
    """A name for the key itself, which tells nothing of it."""
    return hmac.new(key, b"fingerprint", hashlib.sha256).hexdigest()[:16]
