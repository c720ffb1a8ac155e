import gzip
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from conf.schema import Columns
from tasks.data import images, nifti
from tasks.data.aside import read_aside
from tasks.data.source import Faulty, LabelMap, Naming, Reason


@pytest.mark.parametrize("label_map", [None, "nonzero", {0: 0, 1: 3}, Naming({1: 1, "a": 2}, ignore=True)])
def test_elsewhere_is_as_here(tmp_path: Path, label_map: LabelMap) -> None:
    draw = np.random.default_rng(0)
    mask = draw.integers(0, 2, (5, 6, 7)).astype(np.uint8)
    affine = np.diag([-1.0, 2, 3, 1])
    for name, values in (("i", draw.normal(size=(5, 6, 7)).astype(np.float32)), ("m", mask)):
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"{name}.nii.gz")  # type: ignore[no-untyped-call]
    Image.fromarray(draw.integers(0, 255, (5, 6), dtype=np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(mask[..., 0]).save(tmp_path / "m.png")
    readers: dict[str, Callable[..., object]] = {"nifti": nifti.read_pair, "image": images.read_pair}
    for kind, suffix in (("nifti", "nii.gz"), ("image", "png")):
        for other in (None, tmp_path / f"m.{suffix}"):
            there = read_aside(kind, tmp_path / f"i.{suffix}", other, Columns(), label_map)
            here = readers[kind](tmp_path / f"i.{suffix}", other, label_map)
            for name, value in vars(here).items():
                assert np.array_equal(getattr(there, name), value), name


def test_a_volume_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    header: Any = nib.Nifti1Header()  # type: ignore[no-untyped-call]
    header.set_data_shape((1024, 1024, 1024))
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    zeros = gzip.compress(bytes(16 << 20), 9)
    with (tmp_path / "bomb.nii.gz").open("wb") as file:
        file.write(gzip.compress(header.binaryblock + bytes(4)))
        for _ in range(128):
            file.write(zeros)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Faulty, match="memory") as caught:
        read_aside("nifti", tmp_path / "bomb.nii.gz", None, Columns(), None)
    assert caught.value.reason is Reason.LIMIT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_faults_come_through(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "i.png")
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(Faulty, match=r"image 5x4, mask 4x5") as caught:
        read_aside("image", tmp_path / "i.png", tmp_path / "m.png", Columns(), None)
    assert caught.value.reason is Reason.SIZE
    with pytest.raises(Faulty, match=r"none\.png"):
        read_aside("image", tmp_path / "none.png", None, Columns(), None)
