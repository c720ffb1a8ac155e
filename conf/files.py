"""Files that are there whole or not at all, and what a full disk means."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.exits import Exit, Stop


def write_atomic(path: Path, content: bytes, mode: int | None = None) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new, on disk.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Args:
        mode: who may read it, from its first moment on; None: as the umask says.
    """
    with _written(path, content, mode) as temporary:
        temporary.replace(path)


def write_new(path: Path, content: bytes, mode: int | None = None) -> None:
    """`write_atomic` for a file that must not be there yet.

    Raises:
        FileExistsError: it is; nothing was changed.
    """
    with _written(path, content, mode) as temporary:
        os.link(temporary, path)  # fails where rename would overwrite


@contextmanager
def _written(path: Path, content: bytes, mode: int | None) -> Iterator[Path]:
    """The content on disk under another name; whatever was made of it is durable at the end."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident():x}.part")
    try:
        if mode is not None:
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode))
        write_synced(temporary, content)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and make its content durable (its name is, once its folder is synced)."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Make the content of a file durable that something else wrote."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def only_one(path: Path, another: Stop) -> Iterator[None]:
    """Hold a lock as long as the context lasts; whatever ends this process, the system takes it back.

    Args:
        path: its file, which stays.
        another: raised where another process holds it.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise another from None
        yield


@contextmanager
def no_space(what: object, remedy: str) -> Iterator[None]:
    """Turn a full disk into `Stop(DISK_FULL)`: what could not be written, and how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        text = f"disk full while writing {what}; nothing was lost: free space, then {remedy}"
        raise Stop(Exit.DISK_FULL, text) from None


def scratch_prefix() -> str:
    """What names of this process' temporary files begin with."""
    return f"wardround-{os.getpid()}-"


def shared_memory() -> Path:
    """Where files are memory: `/dev/shm`, or the temporary folder of a system without."""
    shm = Path("/dev/shm")  # noqa: S108  names in it are made by tempfile
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


def sweep_scratch() -> None:
    """Remove temporary files that killed processes left behind: some of them are memory."""
    for folder in {shared_memory(), Path(tempfile.gettempdir())}:
        for path in folder.glob("wardround-*-*"):
            pid = path.name.split("-")[1]
            if pid.isdecimal() and not _alive(int(pid)):
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's: not ours to judge
    return True
