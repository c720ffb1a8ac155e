"""The coordinator's folder, read: each mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.exits import Exit, Stop
from server.house import House, read_sites


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Invalid JSON"),
        ("[]", "an object"),
        ("{}", "names no site"),
        (json.dumps({"north": 1}), "site north is 1"),
        (json.dumps({"../north": "KEY"}), "site .*north"),
        (json.dumps({"north": "KEY", "south": "KEY\n"}), "two with one key"),
    ],
)
def test_sites_are_names_with_a_key_each(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sites.json"
    path.write_text(text)
    with pytest.raises(Stop, match=f"sites.json.*{said}") as stop:
        read_sites(path)
    assert stop.value.exit is Exit.CONFIG
    assert "\n" not in str(stop.value)


def test_a_list_of_sites_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(Stop, match=r"sites\.json cannot be read \(FileNotFoundError\)"):
        _ = House(tmp_path, 1).sites
