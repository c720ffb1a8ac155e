"""What a compressed frame says beside its picture: comments and application data, overwritten in place.

A camera's EXIF (place, time, serial number) comes into the hospital within a JPEG, and so may any text.
Nothing changes its length: offset tables hold, and decoders skip these segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

#: what decoders need: densities, and transforms of colours; name, and how many bytes from it on
_NEEDED = {0xE0: (b"JFIF\0", 14), 0xE8: (b"mrfx", 5), 0xEE: (b"Adobe", 12)}
_ITEM = b"\xfe\xff\x00\xe0"  # PS3.5 A.4
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")  # in a scan; stuffed bytes and restarts are none


def blanked(pixel_data: bytes) -> bytes:
    """Encapsulated pixel data whose JPEG, JPEG-LS and JPEG 2000 streams hold zeros instead of text."""
    data = bytearray(pixel_data)
    for at, end in _fragments(data):
        if data[at : at + 2] == b"\xff\xd8":
            _jpeg(data, at + 2, end)
        elif data[at : at + 4] == b"\xff\x4f\xff\x51":
            _jpeg2000(data, at + 2, end)
    return bytes(data)


def _fragments(data: bytearray) -> Iterator[tuple[int, int]]:
    at = 0
    while data[at : at + 4] == _ITEM:
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        yield at + 8, min(end, len(data))
        at = end


def _jpeg(data: bytearray, at: int, end: int) -> None:
    """ITU-T T.81 B.1.1 and T.87: segments with a length, scans of coded data between them."""
    while at + 4 <= end:
        found = _MARKER.search(data, at, end)
        if found is None:
            return
        at, marker = found.start(), data[found.start() + 1]
        if marker == 0xD9:  # what follows the end of an image is none: phones put a second one there
            _blank(data, at + 2, end)
            return
        if marker == 0xD8:
            at += 2
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            name, needed = _NEEDED.get(marker, (b"", 0))
            _blank(data, at + 4 + (needed if data.startswith(name, at + 4) else 0), min(stop, end))
        at = max(stop, at + 2)


def _jpeg2000(data: bytearray, at: int, end: int) -> None:
    """ITU-T T.800 A.3: comments stand in the main header and in those of tile-parts."""
    after = end
    while at + 4 <= end and data[at] == 0xFF:
        marker, stop = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0x90:  # SOT: the length of its tile-part, 0 for the last
            after = at + int.from_bytes(data[at + 6 : at + 10], "big")
            after = after if after > at else end
        elif marker == 0x93:  # SOD
            stop = after
        elif marker == 0x64:  # COM; its first two bytes say whether it is text
            _blank(data, at + 6, min(stop, end))
        at = max(stop, at + 2)


def _blank(data: bytearray, at: int, end: int) -> None:
    data[at:end] = bytes(max(end - at, 0))
