"""Text beside the picture of a compressed frame: gone, and the frame decodes as before (Pillow says so)."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames

from tasks.data.codestream import blanked

PIXELS = np.random.default_rng(0).integers(0, 255, (64, 48, 3), dtype=np.uint8)
MARK = b"CANARY"


def exif() -> Image.Exif:
    found = Image.Exif()
    found[0x010E] = MARK.decode()  # ImageDescription
    return found


FORMS: dict[str, tuple[str, dict[str, Any], bytes, int]] = {
    "jpeg": ("JPEG", {"exif": exif(), "comment": MARK, "icc_profile": MARK}, b"", 3),
    "progressive": ("JPEG", {"exif": exif(), "comment": MARK, "progressive": True}, b"", 2),
    "a second picture": ("JPEG", {}, b"\xff\xd8" + MARK, 1),
    "jpeg 2000": ("JPEG2000", {"comment": MARK.decode(), "no_jp2": True, "tile_size": (32, 32)}, b"", 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_text_goes_and_the_picture_stays(name: str) -> None:
    kind, options, tail, planted = FORMS[name]
    out = BytesIO()
    Image.fromarray(PIXELS).save(out, kind, **options)
    frame = out.getvalue() + tail
    before = encapsulate([frame, frame])
    after = blanked(before)
    assert (before.count(MARK), after.count(MARK)) == (2 * planted, 0)
    assert len(after) == len(before)
    wanted = np.asarray(Image.open(BytesIO(frame)))
    for one in generate_frames(after, number_of_frames=2):
        assert np.array_equal(np.asarray(Image.open(BytesIO(one))), wanted)


STARTS = st.sampled_from([b"\xff\xd8", b"\xff\x4f\xff\x51", b""])


@given(STARTS, st.binary(min_size=1, max_size=60), st.binary(max_size=9))
def test_broken_streams_keep_their_length(start: bytes, body: bytes, more: bytes) -> None:
    data = encapsulate([start + body]) + more
    assert len(blanked(data)) == len(data)
