"""A run's model on new images: the same numbers as the task itself, in files others can read."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from conf.exits import Exit, Stop
from conf.load import compose
from server.checkpoint import RESULT
from server.predict import predict, read
from server.runfolder import RunFolder
from strategies.base import Study

VOLUME = ["model=unet", "model.channels=[4,8]", "task.patch=[8,8,8]"]


def trained(path: Path, *overrides: str) -> Study:
    """A run's directory as its end leaves it, with the first weights for a result."""
    settings = compose([f"data.root={path}", *overrides])
    RunFolder.create(path, settings)
    study = Study.of(settings.plan)
    (path / RESULT).write_bytes(safetensors.torch.save(study.initial))
    return study


def test_a_volume_gets_a_mask_in_its_own_place(tmp_path: Path) -> None:
    study = trained(tmp_path / "run", *VOLUME)
    values = np.random.default_rng(0).normal(size=(9, 10, 8)).astype(np.float32)
    affine = np.array([[-1.5, 0, 0, 3], [0, 1.0, 0, -4], [0, 0, 2.0, 5], [0, 0, 0, 1]])
    (tmp_path / "in").mkdir()
    image = nib.Nifti1Image(values, affine)  # type: ignore[no-untyped-call]
    nib.save(image, tmp_path / "in" / "a.b.nii.gz")
    (tmp_path / "in" / "bad.nii").write_bytes(b"x")
    assert predict(tmp_path / "run", tmp_path / "in", tmp_path / "out") == 1
    source = tmp_path / "in" / "a.b.nii.gz"
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "a.b_mask.nii.gz"
    written = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call]
    image = nib.as_closest_canonical(nib.load(source))  # type: ignore[no-untyped-call]
    assert np.allclose(written.affine, image.affine)
    case = read(source, "a.b", compose(["data.root=."]).data.columns)
    assert np.array_equal(case.images["image"][0].numpy(), np.asarray(image.dataobj))
    model = study.fresh().eval()
    with torch.no_grad():
        mask = study.task.predict(model, case).masks["mask"]
    assert np.array_equal(np.asarray(written.dataobj), mask.numpy())
    assert int(mask.min()) < int(mask.max())


def test_a_picture_gets_scores(tmp_path: Path) -> None:
    given = ["task=classification", "model=lenet", "task.size=[32,32]"]
    study = trained(tmp_path / "run", *given)
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64).astype(np.uint8)).save(
        tmp_path / "x.png"
    )
    assert predict(tmp_path / "run", tmp_path / "x.png", tmp_path / "out") == 1
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    case = read(tmp_path / "x.png", "x", compose(["data.root=."]).data.columns)
    expected = study.task.predict(study.fresh().eval(), case).scores["given"]
    assert [float(row["value"]) for row in rows] == pytest.approx(expected.tolist())
    assert {row["image"] for row in rows} == {"x"}


def test_what_cannot_be_predicted_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", *VOLUME)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.nii").write_bytes(b"x")
    for source, exit in ((tmp_path / "empty", Exit.NO_CASES), (tmp_path / "bad.nii", Exit.NO_CASES)):
        with pytest.raises(Stop, match=r"no image") as stop:
            predict(tmp_path / "run", source, tmp_path / "out")
        assert stop.value.exit is exit
    with pytest.raises(Stop, match="exists; give a new folder"):
        predict(tmp_path / "run", tmp_path / "bad.nii", tmp_path / "empty")
    with pytest.raises(Stop) as stop:
        predict(tmp_path / "empty", tmp_path / "bad.nii", tmp_path / "new")
    assert stop.value.exit is Exit.NO_RUN
    trained(tmp_path / "bn", *VOLUME, "strategy=fedbn")
    with pytest.raises(Stop, match="left a part of the model at each site"):
        predict(tmp_path / "bn", tmp_path / "bad.nii", tmp_path / "new")


def test_a_picture_shows_where_the_evidence_is(tmp_path: Path) -> None:
    trained(tmp_path / "run", "task=classification", "model=lenet", "task.size=[32,32]", "task.cam=true")
    picture = np.zeros((40, 30), dtype=np.uint8)
    picture[5:10, 20:25] = 200
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert predict(tmp_path / "run", tmp_path / "x.png", tmp_path / "out") == 1
    with Image.open(tmp_path / "out" / "x_cam.png") as shown:
        assert (shown.mode, shown.size) == ("RGB", (30, 40))
        values = np.asarray(shown).astype(int)
    assert (values[..., 0] >= values[..., 1]).all()
    assert (values[..., 1] == values[..., 2]).all()


@pytest.mark.parametrize("channels", [1, 2])
def test_a_pair_or_its_first_half_becomes_the_image_that_is_made(tmp_path: Path, channels: int) -> None:
    given = ["task=pix2pix", "model=srcnn", "loss=least_squares", "task.patch=[8,8,8]", "task.window=[0,100]"]
    small = ["task.discriminator={name: patch_gan, width: 4, levels: 1, norm: spectral, groups: 1}"]
    study = trained(tmp_path / "run", *given, *small)
    values = np.random.default_rng(0).uniform(0, 100, (9, 10, 8, 2)).astype(np.float32)[..., :channels]
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "x.nii")  # type: ignore[no-untyped-call]
    assert predict(tmp_path / "run", tmp_path / "x.nii", tmp_path / "out") == 1
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "x_target.nii.gz"
    written = nib.as_closest_canonical(nib.load(path))  # type: ignore[no-untyped-call]
    made = np.asarray(written.dataobj)
    case = read(tmp_path / "x.nii", "x", compose(["data.root=."]).data.columns)
    first = replace(case, images={"image": case.images["image"][:1]})
    with torch.no_grad():
        wanted = study.task.predict(study.fresh().eval(), first).images["target"]
    assert np.array_equal(made, wanted[0].numpy())


@pytest.mark.parametrize(("peak", "mode"), [(255, "L"), (1000, "I;16")])
def test_a_made_picture_keeps_its_values(tmp_path: Path, peak: int, mode: str) -> None:
    given = ["task=pix2pix", "model=srcnn", "loss=least_squares", "task.patch=[8,8]", "task.soften=1"]
    small = ["task.discriminator={name: patch_gan, width: 4, levels: 1, norm: spectral, groups: 1}"]
    study = trained(tmp_path / "run", *given, *small, f"task.window=[0,{peak}]")
    flat = np.random.default_rng(0).integers(peak // 2, peak, (12, 10)).astype(np.uint16)
    Image.fromarray(flat.astype(np.uint8) if peak < 256 else flat).save(tmp_path / "x.png")
    assert predict(tmp_path / "run", tmp_path / "x.png", tmp_path / "out") == 1
    case = read(tmp_path / "x.png", "x", compose(["data.root=."]).data.columns)
    with torch.no_grad():
        wanted = study.task.predict(study.fresh().eval(), case).images["target"][0]
    with Image.open(tmp_path / "out" / "x_target.png") as made:
        assert made.mode == mode
        assert np.abs(np.asarray(made, dtype=float) - wanted.clamp(0, peak).numpy()).max() <= 0.5


def test_a_model_that_also_reads_a_table_is_not_fed_images_alone(tmp_path: Path) -> None:
    given = ["task=classification", "model=lenet", "task.size=[32,32]", "task.columns={age: [50, 10]}"]
    trained(tmp_path / "run", *given)
    Image.fromarray(np.zeros((40, 30), dtype=np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(Stop, match="also reads age, which no image holds") as stop:
        predict(tmp_path / "run", tmp_path / "x.png", tmp_path / "out")
    assert stop.value.exit is Exit.CONFIG
    assert not (tmp_path / "out").exists()
