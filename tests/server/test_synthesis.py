import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from conf.exits import Stop
from conf.load import compose
from server.checkpoint import RESULT
from server.predict import predict
from server.runfolder import RunFolder
from server.simulate import simulate
from server.synthesis import COLUMNS, Trained, evaluate, picture
from strategies.base import Study
from tasks.judging import Pictures

SETTINGS = [
    "task=gan",
    "task.size=[16,16]",
    "task.classes=[a,b]",
    "task.discriminator={name: dcgan_discriminator, width: 4, levels: 2}",
    "model=dcgan",
    "model.width=4",
    "model.levels=2",
    "loss=hinge",
    "data=manifest",
    "data.columns.patient=patient",
    "data.sites=2",
    "federation.rounds=1",
    "local.steps=2",
    "runtime.workers=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan")
    draw, lines = np.random.default_rng(0), ["image,label,patient"]
    (folder / "data").mkdir()
    for i in range(40):
        image = draw.integers(0, 120, (16, 16))
        image[:, 8:] += 100 * (i % 2)
        Image.fromarray(image.astype(np.uint8)).save(folder / "data" / f"{i}.png")
        lines.append(f"{i}.png,{i % 2},p{i}")
    (folder / "data" / "manifest.csv").write_text("\n".join(lines))
    return folder


def trained(folder: Path, name: str, *more: str) -> Path:
    where = [f"data.root={folder}/data", f"data.cache={folder}/cache", f"run.dir={folder}/{name}"]
    return simulate(compose([*SETTINGS, *where, *more]))


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return trained(folder, "run")


def test_two_workers_come_to_the_same_bytes(run: Path, folder: Path) -> None:
    both = trained(folder, "both", "runtime.workers=2")
    assert (both / RESULT).read_bytes() == (run / RESULT).read_bytes()


def test_a_discriminator_may_stay_home_and_a_generator_may_not(folder: Path) -> None:
    home = trained(folder, "home", "strategy=fedper", "strategy.keep=[discriminator.*]")
    before = dict(Study.of(RunFolder.open(home).settings.plan).initial)
    for name, tensor in load((home / RESULT).read_bytes()).items():
        assert torch.equal(tensor, before[name]) == name.startswith("discriminator."), name
    assert set(Trained.of(home).makers) == {"federated", "class_mean", "resampled"}
    given = [*SETTINGS, f"data.root={folder}/data", "strategy=fedper", "strategy.keep=[generator.*]"]
    other = RunFolder.create(folder / "other", compose([*given, f"run.dir={folder}/other"])).path
    shutil.copy(home / RESULT, other)
    with pytest.raises(Stop, match="strategy fedper left a part of the model at each site"):
        evaluate(other)


def test_a_run_is_judged_beside_trivial_makers_and_a_copy_is_told(run: Path) -> None:
    found = evaluate(run, images=60, steps=10)
    assert json.loads((run / "synthetic.json").read_text()) == found
    assert set(found) == {"federated", "class_mean", "resampled"}
    assert all(set(row) == set(COLUMNS) for row in found.values())
    assert found["resampled"]["remembers"] == 1
    assert found["federated"]["remembers"] == 0
    with Image.open(run / "samples.png") as sheet:
        assert sheet.size[0] == 12 * 16


def test_a_picture_has_made_rows_and_a_real_one_for_each_class() -> None:
    made = Pictures(torch.zeros(72, 1, 8, 8, 4), torch.arange(72) % 2)
    real = Pictures(torch.ones(24, 1, 8, 8, 4), torch.arange(24) % 2)
    sheet = np.asarray(Image.open(io.BytesIO(picture(made, real))))
    assert sheet.shape == (2 * 4 * 8, 12 * 8)
    assert (sheet[24:32] == 255).all()
    assert (sheet[:24] == 127).all()
    few = Pictures(torch.ones(2, 1, 8, 8), torch.arange(2))
    sheet = np.asarray(Image.open(io.BytesIO(picture(few, few))))
    assert sheet.shape == (2 * 2 * 8, 12 * 8)
    assert (sheet[:, :8] == 255).all()
    assert (sheet[:, 8:] == 0).all()


def test_a_run_of_another_task_is_refused(run: Path, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "other", compose(["data.root=x", f"run.dir={tmp_path}/other"]))
    with pytest.raises(Stop, match="trained 'segmentation', which makes no images; use: wardround report"):
        evaluate(other.path)
    with pytest.raises(Stop, match="makes images of noise, not of images; use: wardround evaluate"):
        predict(run, tmp_path, tmp_path / "out")
