from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
