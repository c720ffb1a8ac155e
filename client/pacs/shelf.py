"""The folder where instances land: whole or not at all, named by hashes, readable by their owner alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydicom.filereader import read_file_meta_info

from conf.exits import Exit, Stop
from conf.files import only_one, sync_folder


class Other(Exception):
    """What came is not the instance that was asked for."""


@dataclass(frozen=True)
class Instance:
    """One DICOM object of an archive, by its UIDs. `sop_class` is empty where the archive does not say."""

    study: str
    series: str
    uid: str
    sop_class: str = ""


class Shelf:
    """Instances below a folder: `<hash of series>/<hash of instance>.dcm`.

    A name appears by a rename after its content was synced, so the folder itself is the inventory: what has
    its name here is whole, and needs no second transfer. `landed` is called for each.
    """

    def __init__(self, folder: Path, landed: Callable[[], None]) -> None:
        self.folder = folder
        self._landed = landed
        self.spool = folder / ".coming"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder this process' own, and drop what killed processes left half-way.

        Raises:
            Stop: (`SITE_BUSY`) another pull fills it.
        """
        self.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        another = Stop(Exit.SITE_BUSY, f"another pull fills {self.folder}; wait for it")
        with only_one(self.folder / ".lock", another):
            for left in self.spool.iterdir():
                left.unlink()
            yield

    def has(self, instance: Instance) -> bool:
        """Whether it is here, whole."""
        return self._path(instance).exists()

    def land(self, instance: Instance, pieces: Iterable[bytes]) -> None:
        """Write a DICOM file piece by piece; it gets its name when it is whole.

        Raises:
            Other: the file names another instance, or is no DICOM file.
        """
        coming = self.spool / f"{self._path(instance).stem}.part"
        try:
            with os.fdopen(os.open(coming, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                for piece in pieces:
                    file.write(piece)
            _check(coming, instance)
            self.adopt(instance, coming)
        finally:
            coming.unlink(missing_ok=True)

    def adopt(self, instance: Instance, file: Path) -> None:
        """Take over a whole file of the spool."""
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        path = self._path(instance)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        file.replace(path)
        sync_folder(path.parent)
        self._landed()

    def _path(self, instance: Instance) -> Path:
        return self.folder / _hash(instance.series)[:16] / f"{_hash(instance.uid)[:32]}.dcm"


def _check(file: Path, instance: Instance) -> None:
    # file meta alone: a deflated data set could expand to anything (PS3.10 7.1)
    try:
        named = str(read_file_meta_info(file).MediaStorageSOPInstanceUID)
    except Exception as error:  # noqa: BLE001  a broken file makes the reader raise nearly anything
        raise Other(f"no DICOM file ({type(error).__name__})") from None
    if named != instance.uid:
        raise Other("another instance")


def _hash(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()
