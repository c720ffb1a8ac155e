"""A run's model in one file: what another program makes of it is what the run's own network does."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.load import compose
from conf.schema import Data, Section, Settings
from server.checkpoint import RESULT
from server.export import SHEET, captured, export
from server.predict import TEMPERATURE
from server.runfolder import RunFolder
from server.transfer import begin
from strategies.base import Study, Tensors
from strategies.protocol import digest, pack
from tasks.base import Case
from tasks.models import MODELS, NETWORKS, POOLS
from tasks.serving import Served
from tests.small_networks import section, sides, small

PROJECT = Path(__file__).parents[2]
SERVED = [name for name, entry in NETWORKS.items() if entry.shape != "discriminator"]
CRITIC = "task.discriminator={name: patch_gan, width: 4, levels: 2}"
MASKS = ["model=unet", "model.channels=[4,8]", "task.patch=[8,8,12]"]
MADE = ["model=srcnn", "model.channels=[4,4]", "task.patch=[16,16]", "loss=hinge", CRITIC]
NOISE = [
    "task=gan",
    "task.classes=[a,b]",
    "task.latent=5",
    "task.size=[16,16]",
    "model=dcgan",
    "model.width=4",
    "model.levels=2",
    "loss=hinge",
    CRITIC,
]
BAG = [
    "task=classification",
    "model=lenet",
    "task.size=[32,32]",
    "task.view=tiles",
    "task.instances=4",
    "task.columns={age: [50, 10], sex: 2}",
    "data.columns.table={age: number, sex: [F, M]}",
]
SUMS = ["task=classification", "task.size=[32,32]", "strategy=sums", "strategy.predictor=logistic"]


def trained(path: Path, *overrides: str, **result: Tensor) -> tuple[Study, Tensors]:
    """A run's directory as its end leaves it; its weights are not those it would begin with."""
    settings = compose([f"data.root={path}", *overrides])
    RunFolder.create(path, settings)
    study = Study.of(settings.plan)
    draw = torch.Generator().manual_seed(1)
    found = {n: t + 0.1 * torch.rand(t.shape, generator=draw) for n, t in study.initial.items()}
    (path / RESULT).write_bytes(safetensors.torch.save(result or found))
    return study, found


def model_of(study: Study, weights: Tensors) -> nn.Module:
    model = study.fresh().eval()
    model.load_state_dict(weights, strict=False)
    return model


def loaded(blob: bytes) -> tuple[nn.Module, dict[str, Any]]:
    """A program and its sheet, as anybody opens them."""
    files = {SHEET: ""}
    made = torch.export.load(BytesIO(blob), extra_files=files)
    return made.module(), json.loads(files[SHEET])


def exported(path: Path, kind: str = "pt2") -> tuple[nn.Module, dict[str, Any]]:
    """A run's program."""
    said = export(path, kind, path / f"made.{kind}")
    network, sheet = loaded((path / f"made.{kind}").read_bytes())
    assert json.loads(said) == sheet
    return network, sheet


def written(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """A run's tensors."""
    export(path, "safetensors", path / "made.safetensors")
    with safetensors.safe_open(path / "made.safetensors", "pt") as file:
        sheet = json.loads(file.metadata()["wardround"])
    return safetensors.torch.load_file(path / "made.safetensors"), sheet


def zscored(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    cut = np.clip(image, *np.percentile(image, [low, high]))
    scaled: NDArray[np.float32] = ((cut - cut.mean()) / cut.std()).astype(np.float32)
    return scaled


@pytest.mark.parametrize("name", SERVED)
def test_a_program_does_what_the_network_does(name: str) -> None:
    entry = NETWORKS[name]
    axes = entry.dimensions[0]
    draw = torch.Generator().manual_seed(0)

    def given(batch: int) -> dict[str, Tensor]:
        if entry.shape == "generator":
            return {"noise": torch.randn(batch, 4, generator=draw), "label": torch.arange(batch) % 2}
        shape = sides(name, axes) if entry.shape == "map" else (32,) * axes
        return {"image": torch.randn(batch, 1 if axes else 5, *shape, generator=draw)}

    if entry.shape == "generator":
        torch.manual_seed(0)
        model: nn.Module = MODELS.build(
            section(name), in_channels=4, out_channels=1, sides=(16,) * axes, dimensions=axes, classes=2
        )
    else:
        model = small(name, axes, inputs=1 if axes else 5)
    network = captured(Served(model.eval(), given(2), ("", ""), {})).module()
    for batch in (1, 3):
        inputs = given(batch).values()
        with torch.no_grad():
            torch.testing.assert_close(network(*inputs), model(*inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", POOLS)
def test_a_program_pools_as_the_pool_does(name: str) -> None:
    torch.manual_seed(0)
    pool: nn.Module = POOLS.build(Section(name=name), features=6).eval()
    bags = {"bags": torch.randn(2, 5, 6), "there": torch.ones(2, 5, dtype=torch.bool)}
    network = captured(Served(pool, bags, ("", ""), {})).module()
    for batch in (1, 3):
        inputs = torch.randn(batch, 5, 6), torch.rand(batch, 5) < 0.7
        with torch.no_grad():
            torch.testing.assert_close(network(*inputs), pool(*inputs), atol=1e-5, rtol=0)


def test_a_stranger_segments_as_the_run_does(tmp_path: Path) -> None:
    study, weights = trained(tmp_path / "run", *MASKS)
    network, sheet = exported(tmp_path / "run")
    image = np.random.default_rng(0).gamma(2, 50, sheet["patch"]).astype(np.float32)
    assert sheet["normalise"] == "zscore"
    assert sheet["inputs"] == {"image": {"shape": ["B", 1, 8, 8, 12], "dtype": "float32"}}
    logits = network(torch.from_numpy(zscored(image, *sheet["percentiles"]))[None, None])
    case = Case("a", "a", {"image": torch.from_numpy(image)[None]}, torch.eye(4).double(), (1.0,) * 3)
    mask = study.task.predict(model_of(study, weights), case).masks["mask"]
    assert torch.equal(logits.argmax(1)[0], mask.long())
    assert len(sheet["classes"]) == logits.shape[1]
    assert sheet["privacy"] is None
    assert sheet["plan"] == study.plan.digest
    assert sheet["weights"] == digest((tmp_path / "run" / RESULT).read_bytes())


def test_a_stranger_reads_bags_and_tables_at_the_runs_temperature(tmp_path: Path) -> None:
    study, weights = trained(tmp_path / "run", *BAG)
    (tmp_path / "run" / TEMPERATURE).write_text('{"temperature": 1.7}')
    network, sheet = exported(tmp_path / "run")
    image = np.random.default_rng(0).gamma(2, 50, (64, 64)).astype(np.float32)
    tiles = (
        zscored(image, *sheet["percentiles"]).reshape(2, 32, 2, 32).swapaxes(1, 2).reshape(1, 4, 1, 32, 32)
    )
    mean, deviation = sheet["columns"]["age"]
    male = sheet["categories"]["sex"].index("M")
    table = [[(63 - mean) / deviation, 0, male == 0, male == 1, 0]]
    assert list(sheet["inputs"]) == ["image", "table"]
    with torch.no_grad():
        logits = network(torch.from_numpy(tiles), torch.tensor(table, dtype=torch.float32))
    table_of_case = {"age": 63.0, "sex": 1.0}
    tensors = {"image": torch.from_numpy(image)[None]}
    case = Case("a", "a", tensors, torch.eye(4).double(), (1.0,) * 2, table=table_of_case)
    predictor: Any = study.task.sums()["calibrated"]
    said = study.task.predict(model_of(study, weights), case)
    given = predictor.scaled(said, torch.tensor(1.7)).scores["given"]
    torch.testing.assert_close(
        (logits / sheet["temperature"]).softmax(1)[0].double(), given, atol=1e-5, rtol=0
    )


def test_of_a_game_what_makes_the_image_is_exported(tmp_path: Path) -> None:
    study, weights = trained(tmp_path / "run", "task=cyclegan", "task.target=sharp", *MADE)
    network, sheet = exported(tmp_path / "run")
    given = torch.randn(3, 1, *sheet["patch"], generator=torch.Generator().manual_seed(0))
    generator = model_of(study, weights).get_submodule("generator")
    with torch.no_grad():  # the network makes what is added to its input
        torch.testing.assert_close(network(given), given + generator(given), atol=1e-5, rtol=0)
    assert sheet["output"]["name"] == "sharp"
    tensors, _ = written(tmp_path / "run")
    own = {name: t.tolist() for name, t in weights.items() if name.startswith("generator.")}
    assert {name: t.tolist() for name, t in tensors.items()} == own


def test_a_generator_takes_noise_and_classes_where_it_knows_some(tmp_path: Path) -> None:
    study, weights = trained(tmp_path / "run", *NOISE)
    network, sheet = exported(tmp_path / "run")
    noise, label = torch.randn(3, 5), torch.tensor([0, 1, 1])
    assert list(sheet["inputs"]) == ["noise", "label"]
    assert sheet["classes"] == ["a", "b"]
    generator = model_of(study, weights).get_submodule("generator")
    with torch.no_grad():
        torch.testing.assert_close(network(noise, label), generator(noise, label), atol=1e-5, rtol=0)
    study, weights = trained(tmp_path / "plain", *NOISE, "task.classes=[]")
    task: Any = study.task
    served = task.served(model_of(study, weights))
    assert list(served.inputs) == ["noise"]
    assert served.network(noise).shape == (3, 1, 16, 16)


def test_another_run_begins_with_the_exported_weights(tmp_path: Path) -> None:
    study, weights = trained(tmp_path / "run", *MASKS)
    tensors, sheet = written(tmp_path / "run")
    assert {name: t.tolist() for name, t in tensors.items()} == {n: t.tolist() for n, t in weights.items()}
    file = str(tmp_path / "run" / "made.safetensors")
    settings, blob = begin(Settings(plan=study.plan, data=Data(root="."), init=file))
    assert blob == pack(weights)
    assert settings.plan.init == digest(pack(weights))
    assert sheet["classes"] == ["background", "foreground"]


def test_privacy_is_told_and_nobodys_name_or_path(tmp_path: Path) -> None:
    private = ["privacy=dpsgd", "privacy.sigma=1", "privacy.nominal_patients=9"]
    trained(tmp_path / "secret", *MASKS, "data.columns.site=hospital_7", *private)
    charged = {"st_elsewhere": [{"sigma": 1.0, "q": 0.2, "steps": 3}]}
    said = {"unit": "patient, at one hospital", "epsilon": 3.5, "delta": 1e-5, "charged": charged}
    (tmp_path / "secret" / "privacy.json").write_text(json.dumps(said))
    _, sheet = exported(tmp_path / "secret")
    assert sheet["privacy"] == {"unit": "patient, at one hospital", "epsilon": 3.5, "delta": 1e-5}
    tensors, _ = written(tmp_path / "secret")
    assert tensors
    plain = (tmp_path / "secret" / "made.safetensors").read_bytes()
    with zipfile.ZipFile(tmp_path / "secret" / "made.pt2") as file:
        parts = [file.read(name) for name in file.namelist()]
    for part in (*parts, plain):
        for word in ("st_elsewhere", "hospital_7", "secret", str(PROJECT), "/tasks/", ".py"):
            assert word.encode() not in part
    (tmp_path / "secret" / "privacy.json").unlink()
    with pytest.raises(Stop, match=r"no readable privacy\.json"):
        export(tmp_path / "secret", "pt2", tmp_path / "new.pt2")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", *MASKS)
    trained(tmp_path / "bn", *MASKS, "strategy=fedbn", "model.norm=instance")
    central = ["privacy=central", "privacy.sigma=1", "federation.weight=equal"]
    trained(tmp_path / "central", *MASKS, "strategy=fedbn", "model.norm=instance", *central)
    weights = torch.zeros(3, 1, dtype=torch.float64)
    trained(tmp_path / "sums", *SUMS, "federation.rounds=8", weights=weights)
    RunFolder.create(tmp_path / "young", compose([f"data.root={tmp_path}", *MASKS]))
    (tmp_path / "there.pt2").write_bytes(b"x")
    for run, kind, out, exit, text in (
        ("run", "onnx", "x.onnx", Exit.UNKNOWN_NAME, "format is 'onnx'; known: pt2, safetensors"),
        ("run", "pt2", "x.safetensors", Exit.CONFIG, "a file of --format pt2 ends in .pt2"),
        ("run", "pt2", "there.pt2", Exit.RUN_EXISTS, "exists; give a new file"),
        ("none", "pt2", "x.pt2", Exit.NO_RUN, "is not a run directory"),
        ("young", "pt2", "x.pt2", Exit.NO_RUN, "no model.safetensors yet; end it with: wardround resume"),
        ("bn", "pt2", "x.pt2", Exit.CONFIG, "strategy fedbn left a part of the model at each site"),
        ("central", "pt2", "x.pt2", Exit.CONFIG, "strategy fedbn left a part of the model at each site"),
        ("sums", "safetensors", "x.safetensors", Exit.CONFIG, "trained no network by gradients"),
    ):
        with pytest.raises(Stop, match=text) as stop:
            export(tmp_path / run, kind, tmp_path / out)
        assert stop.value.exit is exit
    assert (tmp_path / "there.pt2").read_bytes() == b"x"
    assert not (tmp_path / "x.pt2").exists()


def test_ditto_and_a_discriminator_at_home_leave_a_whole_network(tmp_path: Path) -> None:
    trained(tmp_path / "ditto", *MASKS, "strategy=ditto")
    home = ["strategy=fedper", "strategy.keep=[discriminator.*]"]
    trained(tmp_path / "gan", *NOISE, *home)
    for name in ("ditto", "gan"):
        assert written(tmp_path / name)[0]


class _Asking(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image if float(image.sum()) > 0 else -image


def test_a_network_that_is_no_program_is_named(tmp_path: Path) -> None:
    served = Served(_Asking(), {"image": torch.zeros(2, 3)}, ("", ""), {})
    with pytest.raises(Stop, match=r"cannot be made a program .*; use --format safetensors") as stop:
        captured(served)
    assert stop.value.exit is Exit.CONFIG
