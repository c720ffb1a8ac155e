"""Which code a result came from: both ends compute the digest, and a site refuses another one."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

_CONF = ("conf/schema.py", "conf/dictionary.py", "conf/section.py", "conf/table.py", "conf/files.py")
_PARTS = (*_CONF, "tasks", "strategies", "client")
_LIBRARIES = ("torch", "numpy", "monai")


@cache
def code_digest() -> str:
    """SHA-256 over the sources that decide what a site computes, and over the libraries' public versions.

    Line ends are normalised and local version parts (`+cu130`) dropped: a checkout on another system and
    a GPU build of the same release are the same code.
    """
    root = Path(__file__).resolve().parent.parent
    files = [path for part in _PARTS for path in (sorted((root / part).rglob("*.py")) or [root / part])]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    for name in _LIBRARIES:
        digest.update(f"{name}=={version(name).partition('+')[0]}\0".encode())
    return digest.hexdigest()
