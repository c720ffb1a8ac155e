import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.io import imsave

from tasks.data.images import read_pair
from tasks.data.source import Faulty, Reason

DRAW = np.random.default_rng(0)
GRAY = DRAW.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = DRAW.integers(0, 65536, (5, 7), dtype=np.uint16)
COLOUR = DRAW.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def write(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


@pytest.mark.parametrize(
    ("suffix", "values"),
    [(s, v) for s in ("png", "bmp", "tif") for v in (GRAY, COLOUR)]
    + [("png", DEEP), ("TIFF", DEEP), ("tif", GRAY.astype(np.float32) / 7)],
)
def test_stored_values_come_back(tmp_path: Path, suffix: str, values: np.ndarray) -> None:
    raw = read_pair(write(tmp_path / f"a.{suffix}", values), None, None)
    wanted = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    assert raw.image is not None
    assert np.array_equal(raw.image, wanted.astype(np.float32))
    assert raw.image.flags["C_CONTIGUOUS"]
    assert raw.spacing == (1.0, 1.0)
    assert np.array_equal(raw.affine, np.eye(4))


def test_jpeg_decodes_as_pillow_does(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpeg", COLOUR)
    raw = read_pair(path, None, None)
    assert raw.image is not None
    assert np.array_equal(raw.image, np.asarray(Image.open(path)).transpose(2, 0, 1))


def test_alpha_is_dropped_and_palettes_are_colours_in_images_but_numbers_in_masks(tmp_path: Path) -> None:
    rgba = np.concatenate([COLOUR, GRAY[..., None]], axis=-1)
    raw = read_pair(write(tmp_path / "a.png", rgba), None, None)
    assert raw.image is not None
    assert np.array_equal(raw.image, COLOUR.transpose(2, 0, 1))
    indexed = Image.frombytes("P", (7, 5), (GRAY % 3).tobytes())
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    indexed.save(tmp_path / "p.png")
    raw = read_pair(tmp_path / "p.png", tmp_path / "p.png", None)
    assert raw.image is not None
    assert raw.image.shape == (3, 5, 7)
    assert np.array_equal(raw.image[0], 10 + 30 * (GRAY % 3))
    assert raw.mask is not None
    assert np.array_equal(raw.mask, GRAY % 3)


def test_masks_of_any_gray_kind(tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", GRAY)
    bits = GRAY > 99
    for name, values in {
        "bit": bits,
        "byte": bits.astype(np.uint8) * 255,
        "deep": bits.astype(np.uint16) * 60000,
        "gray colour": np.repeat((bits * 255).astype(np.uint8)[..., None], 3, axis=2),
    }.items():
        raw = read_pair(image, write(tmp_path / f"{name}.png", values), "nonzero")
        assert raw.mask is not None
        assert raw.mask.dtype == np.uint8
        assert np.array_equal(raw.mask, bits)


def test_what_is_refused(tmp_path: Path) -> None:
    image = write(tmp_path / "a.png", GRAY)
    with pytest.raises(Faulty, match=r"image 7x5, mask 5x7 \(width x height\)") as caught:
        read_pair(image, write(tmp_path / "turned.png", GRAY.T.copy()), "nonzero")
    assert caught.value.reason is Reason.SIZE
    with pytest.raises(Faulty, match="is in colour") as caught:
        read_pair(image, write(tmp_path / "colour.png", COLOUR), "nonzero")
    assert caught.value.reason is Reason.MASK_KIND
    frames = [Image.fromarray(GRAY), Image.fromarray(GRAY.T.copy())]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(Faulty, match="has 2 frames") as caught:
        read_pair(tmp_path / "two.tif", None, None)
    assert caught.value.reason is Reason.SHAPE
    with pytest.raises(Faulty, match=r"mask has .*; accepted 0, 255 \(setting: data.label_map\)") as caught:
        read_pair(image, image, {0: 0, 255: 1})
    assert caught.value.reason is Reason.LABEL


@pytest.mark.parametrize("keep", [0, 5, 40, -200])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_cut_file_is_unreadable(tmp_path: Path, suffix: str, keep: int) -> None:
    path = write(tmp_path / f"a.{suffix}", DRAW.integers(0, 256, (64, 64), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Faulty, match=rf"a\.{suffix}") as caught:
        read_pair(path, None, None)
    assert caught.value.reason is Reason.UNREADABLE


def test_a_stack_of_pages_is_a_volume_where_asked(tmp_path: Path) -> None:
    stack = DRAW.integers(0, 256, (3, 5, 7), dtype=np.uint8)
    drawn = (stack > 99).astype(np.uint8) * 255
    for name, values in (("a", stack), ("m", drawn)):
        pages = [Image.fromarray(p) for p in values]
        pages[0].save(tmp_path / f"{name}.tif", save_all=True, append_images=pages[1:])
    raw = read_pair(tmp_path / "a.tif", tmp_path / "m.tif", "nonzero", pages="volume")
    assert raw.image is not None
    assert raw.mask is not None
    assert np.array_equal(raw.image[0], stack.transpose(1, 2, 0))
    assert np.array_equal(raw.mask, stack.transpose(1, 2, 0) > 99)
    assert raw.spacing == (1.0, 1.0, 1.0)
    one = read_pair(write(tmp_path / "one.tif", GRAY), None, None, pages="volume").image
    assert one is not None
    assert one.shape == (1, 5, 7, 1)
    with pytest.raises(Faulty, match=r"data\.columns\.pages=volume"):
        read_pair(tmp_path / "a.tif", None, None)
    with pytest.raises(Faulty, match="image 7x5x3, mask 7x5x1"):
        read_pair(tmp_path / "a.tif", tmp_path / "one.tif", None, pages="volume")


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_camera_is_turned_back(tmp_path: Path, turn: int) -> None:
    # Exif 2.3, tag 0112: where row 0 and column 0 of what is stored lie in what was seen
    seen = np.arange(35, dtype=np.uint8).reshape(5, 7)
    stored = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1],
        5: seen.T, 6: np.rot90(seen), 7: seen[::-1, ::-1].T, 8: np.rot90(seen, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    for suffix in ("png", "tif"):
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif)
        raw = read_pair(tmp_path / f"a.{suffix}", None, None)
        assert raw.image is not None
        assert np.array_equal(raw.image[0], seen)
        assert bool(raw.notes) == (turn != 1)


def test_sixteen_bits_per_colour_are_refused_not_halved(tmp_path: Path) -> None:
    deep = DRAW.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    imsave(tmp_path / "a.tif", deep, check_contrast=False)
    (tmp_path / "a.png").write_bytes(png(deep))
    for name in ("a.tif", "a.png"):
        with pytest.raises(Faulty, match=f"{name} has 16 bits per colour") as caught:
            read_pair(tmp_path / name, None, None)
        assert caught.value.reason is Reason.SHAPE


def png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colours (PNG 2003, 5.3); Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_colour_and_gray_get_one_number_of_channels_where_asked(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    gray = write(tmp_path / "g.png", rgb[:, :, 0])
    coloured = write(tmp_path / "c.png", rgb)
    same = read_pair(gray, None, None, colour="rgb").image
    assert same is not None
    assert (same == rgb[:, :, 0][None]).all()
    assert same.shape == (3, 5, 4)
    kept = read_pair(coloured, None, None, colour="rgb").image
    assert kept is not None
    assert np.array_equal(kept, np.moveaxis(rgb, 2, 0))
    luma = read_pair(coloured, None, None, colour="gray").image
    assert luma is not None
    assert luma.dtype == np.uint8
    with Image.open(coloured) as file:
        assert np.abs(luma[0].astype(int) - np.asarray(file.convert("L"), dtype=int)).max() <= 1
    one = read_pair(gray, None, None, colour="gray").image
    assert one is not None
    assert np.array_equal(one, rgb[:, :, 0][None])
