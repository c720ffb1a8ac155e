"""Files that are there whole or not at all."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from conf.files import write_atomic, write_new


@pytest.mark.parametrize("write", [write_atomic, write_new])
def test_a_file_is_whole_private_and_alone(tmp_path: Path, write: Callable[..., None]) -> None:
    write(tmp_path / "key", b"content", mode=0o600)
    assert (tmp_path / "key").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_a_new_file_goes_over_no_other(tmp_path: Path) -> None:
    write_new(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError, match="key"):
        write_new(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]
    write_atomic(tmp_path / "key", b"third")
    assert (tmp_path / "key").read_bytes() == b"third"
