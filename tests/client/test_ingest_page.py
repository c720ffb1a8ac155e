import base64
import io
import json
import re
import stat
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from client.ingest_page import SHOWN, write_report
from client.thumbs import SIDE, colour, thumbs
from tasks.data.cache import Cache, Entry, Record
from tasks.data.source import Raw, Reason
from tasks.data.summary import facts, summarise

VOID = {"meta", "img", "br", "link", "input"}


def keep(cache: Cache, raw: Raw, source: str = "a", patient: str = "p") -> Record:
    digest = cache.put(raw)
    assert raw.image is not None
    entry = Entry(digest[:16], patient, None, None, digest, raw.image.shape, {}, source)
    return Record("", entry, patient=patient, facts=facts(raw))


class Page(HTMLParser):
    """What a browser would make of it: every tag closed, and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def pictures(self) -> list[Image.Image]:
        sources = [a["src"] or "" for t, a in self.seen if t == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def corner(axes: str) -> Raw:
    """A volume with one bright and labelled corner: to the patient's right, front and head."""
    image = np.zeros((1, 20, 20, 8), np.int16)
    mask = np.zeros((20, 20, 8), np.uint8)
    image[0, 15:, 15:, 6:] = 100
    if axes:
        mask[15:, 15:, 6:] = 2
    return Raw(image, mask, np.diag([1.0, 1, 5, 1]), (1.0, 1.0, 5.0))


def test_slices_lie_as_a_radiographer_expects(tmp_path: Path) -> None:
    record = keep(Cache(tmp_path), corner(""))
    assert record.entry is not None
    shown = {t.view: t for t in thumbs(Cache(tmp_path).path(record.entry.digest), (17, 17, 7), (0, 100))}
    assert {view: t.letters for view, t in shown.items()} == {
        "axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI",
    }  # fmt: skip
    for thumb in shown.values():  # right, front and head are on the left and above in all three
        picture = np.asarray(Image.open(io.BytesIO(thumb.png)).convert("L"))
        rows, columns = np.nonzero(picture > 128)
        assert rows.max() < picture.shape[0] / 2
        assert columns.max() < picture.shape[1] / 2
        assert picture.shape == (thumb.height, thumb.width)
    # 20 x 20 mm across, 8 slices of 5 mm: higher than wide
    assert (shown["axial"].width, shown["axial"].height) == (SIDE, SIDE)
    assert (shown["coronal"].width, shown["coronal"].height) == (SIDE // 2, SIDE)


def test_the_mask_is_drawn_in_its_colour(tmp_path: Path) -> None:
    record = keep(Cache(tmp_path), corner("mask"))
    assert record.entry is not None
    assert record.facts["look"] == [15, 15, 6]
    for thumb in thumbs(Cache(tmp_path).path(record.entry.digest), record.facts["look"], (0, 100)):
        picture = np.asarray(Image.open(io.BytesIO(thumb.png)))
        assert (picture == colour(2)).all(axis=2).any()
        assert not (picture == colour(1)).all(axis=2).any()


def test_nothing_in_names_becomes_markup(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    evil = "<script>alert(1)</script>\"'><img src=http://x/ onerror=y>\x1b[2J"
    records = {
        evil: keep(cache, corner("mask"), evil),
        evil + "2": Record("", None, Reason.TILT, evil, patient="p", unmapped=(evil,), notes=(evil,)),
    }
    write_report(tmp_path / "state" / "r", evil, summarise(records, 1), records, cache, {2: evil})
    for suffix in (".html", ".json", ".txt"):
        path = tmp_path / "state" / f"r{suffix}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert "\x1b" not in path.read_text()
    text = (tmp_path / "state" / "r.html").read_text()
    page = Page(text)
    assert {t for t, _ in page.seen} & {"script", "link", "iframe", "object", "form", "a"} == set()
    assert all(
        (a.get("src") or "data:").startswith("data:image/png;base64,") for t, a in page.seen if t == "img"
    )
    assert not any(name.startswith("on") for _, a in page.seen for name in a)
    assert "http://x" not in re.sub(r"&lt;.*?&gt;", "", text)
    assert text.index("For the engineer of this site only") < text.index("<h1>")
    assert len(page.pictures()) == 3
    assert json.loads((tmp_path / "state" / "r.json").read_text())["kept"] == 1


def test_thousands_of_cases_make_a_page_of_a_few(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    one = keep(cache, corner("mask"))
    records = {f"{i:04}": one for i in range(3000)}
    write_report(tmp_path / "r", "north", summarise(records, 1), records, cache)
    text = (tmp_path / "r.html").read_text()
    shown = len(Page(text).pictures()) // 3
    assert SHOWN // 2 < shown <= SHOWN
    assert f"{shown} of 3,000, every 84th by name" in text
    assert len(text) < 2_000_000


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_and_missing_objects(tmp_path: Path, channels: int) -> None:
    cache = Cache(tmp_path / "cache")
    image = np.random.default_rng(0).integers(0, 255, (channels, 30, 40), dtype=np.uint8)
    records = {"a": keep(cache, Raw(image, None, np.eye(4), (1.0, 1.0)))}
    write_report(tmp_path / "r", "north", summarise(records, 1), records, cache)
    (picture,) = Page((tmp_path / "r.html").read_text()).pictures()
    assert picture.size == (SIDE, SIDE * 30 // 40)
    next(cache.folder.glob("objects/*/*")).unlink()
    write_report(tmp_path / "r", "north", summarise(records, 1), records, cache)
    assert "its object cannot be read" in (tmp_path / "r.html").read_text()
