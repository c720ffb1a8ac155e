import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.exits import Stop
from conf.load import compose
from server.simulate import simulate
from server.synthesis import COLUMNS, evaluate, picture
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
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan")
    draw, lines = np.random.default_rng(0), ["image,label,patient"]
    (folder / "data").mkdir()
    for i in range(40):
        image = draw.integers(0, 120, (16, 16))
        image[:, 8:] += 100 * (i % 2)
        Image.fromarray(image.astype(np.uint8)).save(folder / "data" / f"{i}.png")
        lines.append(f"{i}.png,{i % 2},p{i}")
    (folder / "data" / "manifest.csv").write_text("\n".join(lines))
    where = [f"data.root={folder}/data", f"data.cache={folder}/cache", f"run.dir={folder}/run"]
    return simulate(compose([*SETTINGS, *where]))


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


def test_a_run_of_another_task_is_refused(run: Path, tmp_path: Path) -> None:
    from server.runfolder import RunFolder

    other = RunFolder.create(tmp_path / "other", compose(["data.root=x", f"run.dir={tmp_path}/other"]))
    with pytest.raises(Stop, match="trained 'segmentation', which makes no images; use: wardround report"):
        evaluate(other.path)
