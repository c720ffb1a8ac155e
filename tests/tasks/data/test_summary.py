import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasks.data.cache import Entry, Record
from tasks.data.source import Raw, Reason
from tasks.data.summary import IDS, as_text, facts, summarise


def entry(source: str, patient: str, **more: Any) -> Entry:
    digest = hashlib.sha256(source.encode()).hexdigest()
    given: dict[str, Any] = {"site": None, "split": None, "shape": (1, 4, 5, 6), "groups": {}, **more}
    return Entry(key=digest[:16], patient=patient, digest=digest, source=source, **given)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6), elements=st.integers(0, 3)))
def test_facts_of_a_case(mask: np.ndarray) -> None:
    image = np.arange(mask.size, dtype=np.int16).reshape(1, *mask.shape)
    spacing = (1.0, 2.0, 3.0)[: mask.ndim]
    found = facts(Raw(image, mask, np.eye(4), spacing, units="HU"))
    assert found["classes"] == {str(c): int((mask == c).sum()) for c in np.unique(mask)}
    for axis, at in enumerate(found["look"]):
        planes = [(np.take(mask, i, axis) > 0).sum() for i in range(mask.shape[axis])]
        assert planes[at] == max(planes) or not mask.any()
    low, _, middle, _, high = found["intensity"]
    assert (low, middle, high) == (0, pytest.approx((mask.size - 1) / 2), mask.size - 1)
    assert (found["units"], found["spacing"]) == ("HU", list(spacing))


def test_equal_pixels_have_one_name_whatever_the_header() -> None:
    image = np.arange(24, dtype=np.int16).reshape(1, 2, 3, 4)
    one = facts(Raw(image, None, np.eye(4), (1, 1, 1)))
    other = facts(Raw(image.copy(), None, 2 * np.eye(4), (2, 2, 2), units="HU"))
    assert one["pixels"] == other["pixels"] != facts(Raw(image + 1, None, np.eye(4), (1, 1, 1)))["pixels"]
    assert one["pixels"] != facts(Raw(image.reshape(1, 3, 2, 4), None, np.eye(4), (1, 1, 1)))["pixels"]


def test_everything_is_counted() -> None:
    fact = {"units": "HU", "spacing": [1.0, 1.0, 3.0], "intensity": [0, 1, 2, 3, 4], "labels": {"tb": 1.0}}
    records = {
        "a/1": Record(
            "",
            entry("a/1", "p", split="train", groups={"sex": "F"}),
            patient="p",
            facts={**fact, "pixels": "same", "classes": {"0": 90, "1": 10}},
        ),
        "a/2": Record(
            "",
            entry("a/2", "p", split="test", site="x", groups={"sex": "M"}),
            patient="p",
            facts={**fact, "spacing": [1.0, 2.0, 5.0], "classes": {"0": 100}},
            unmapped=("kidney",),
        ),
        "b/1": Record(
            "",
            entry("b/1", "q", split="test", groups={"sex": ""}),
            patient="q",
            facts={**fact, "pixels": "same", "intensity": [7, 7, 7, 7, 7], "classes": {"0": 50, "1": 50}},
        ),
        **{f"c/{i}": Record("", None, Reason.TILT, "", patient="r") for i in range(30)},
        "d": Record("", None, Reason.NO_MASK, "", notes=("turned",), unmapped=("kidney",)),
    }
    summary = summarise(records, read=5)
    assert (summary.cases, summary.kept, summary.read, summary.patients) == (34, 3, 5, 2)
    assert [(g.what, g.count, len(g.ids)) for g in summary.out] == [
        ("gantry tilt", 30, IDS), ("image without mask", 1, 1),
    ]  # fmt: skip
    assert summary.shapes == {"3D": [[4, 4, 4], [5, 5, 5], [6, 6, 6]]}
    assert summary.spacings == {"3D": [[1, 1, 1], [1, 1, 2], [3, 3, 5]]}
    assert summary.intensities == {"HU": [0, 1, 2, 3, 4]}
    assert summary.classes == {"0": (3, 240 / 300), "1": (2, 60 / 300)}
    assert summary.labels == {"tb": {"1": 3}}
    assert [(g.what, g.ids) for g in summary.same] == [("of 2 patients", ["a/1", "b/1"])]
    assert [(g.what, g.ids) for g in summary.several] == [
        ("in several splits", ["p (test, train)"]),
        ("in several sexes", ["p (F, M)"]),
    ]
    assert {g.what: g.ids for g in summary.odd} == {"empty mask": ["a/2"], "image of one value": ["b/1"]}
    assert (summary.unmapped, summary.notes) == ({"kidney": 2}, {"turned": 1})
    text = as_text(summary)
    assert "    30  gantry tilt: c/0" in text
    assert "… and 10 more" in text


def test_names_of_files_cannot_move_the_cursor() -> None:
    record = Record("", None, Reason.TILT, "", patient="p")
    assert "\x1b" not in as_text(summarise({"\x1b[2Jx\nkept 9": record}, 0))
    assert len(as_text(summarise({"x\ny": record}, 0)).splitlines()) == 4


def test_nothing_at_all(tmp_path: Path) -> None:
    assert as_text(summarise({}, 0)).splitlines()[0] == "cases in      0"


def test_values_that_are_not_listed_are_counted() -> None:
    fact = {"units": "", "spacing": [1.0, 1.0]}
    records = {
        f"f{i}": Record("s", entry(f"f{i}", "p"), facts={**fact, "labels": {"dose": 1e8 + i}})
        for i in range(IDS + 5)
    }
    (counts,) = summarise(records, 0).labels.values()
    assert counts == {"1e+08": IDS, "others": 5}
