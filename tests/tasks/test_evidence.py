"""Maps of evidence: closed forms, a network whose evidence is known, and the pointing game."""

import pytest
import torch
from torch import Tensor, nn

from conf.schema import Plan
from tasks.base import Case, Prediction, build_task
from tasks.classification import Classification
from tasks.evidence import grad_cam
from tasks.models import NETWORKS
from tasks.networks.trunk import Mean, Trunk
from tasks.scoring.pointing import Pointed
from tests.small_networks import section

VECTOR = [(n, d) for n, entry in NETWORKS.items() if entry.shape == "vector" for d in entry.dimensions if d]


def built(dimensions: int = 2, model: str = "lenet", **task: object) -> Classification:
    given = {"name": "classification", "size": [32] * dimensions, "cam": True, **task}
    made = build_task(
        Plan.model_validate(
            {
                "task": given,
                "model": section(model).model_dump(),
                "loss": {"name": "class_cross_entropy"},
                "strategy": {"name": "fedavg"},
            }
        )
    )
    assert isinstance(made, Classification)
    return made


class Known(nn.Module):
    """Its maps are what is bright, and what is dark."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], 1)


def known() -> Trunk:
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # dark: class 0, bright: class 1
    return Trunk(Known(), Mean(), head, 2)


def case(shape: tuple[int, ...], bright: tuple[int, ...], dark: tuple[int, ...], by: float) -> Case:
    image = torch.zeros(shape)
    image[tuple(slice(a, a + 4) for a in bright)] = by
    image[tuple(slice(a, a + 4) for a in dark)] = by - 3
    mask = torch.zeros(shape, dtype=torch.uint8)
    mask[tuple(slice(a, a + 4) for a in bright)] = 1
    return Case(
        "c", "p", {"image": image[None]}, torch.eye(4), (1.0,) * len(shape), {"mask": mask}, {"label": 1.0}
    )


@pytest.mark.parametrize("shape", [(64, 48), (32, 40, 36)])
@pytest.mark.parametrize("by", [1.0, 2.0])
def test_the_map_is_where_the_evidence_is_known_to_be(shape: tuple[int, ...], by: float) -> None:
    task = built(len(shape), normalise="window", window=[-3, 3])
    one = case(shape, (20,) * len(shape), (4,) * len(shape), by)
    said = task.predict(known(), one)
    heat = said.maps["cam"]
    assert heat.shape == shape
    found = torch.tensor(torch.unravel_index(heat.argmax(), shape))
    bright = by == 2.0
    assert int(said.scores["given"].argmax()) == bright
    at = 20 if bright else 4
    assert ((found >= at - 1) & (found <= at + 4)).all()
    value = task.score([one], [said]).value()
    assert value["pointing"] == value[f"pointing_{int(bright)}"] == float(bright)


def test_behind_a_mean_and_a_linear_head_it_is_cam() -> None:
    torch.manual_seed(0)
    body, head = nn.Conv2d(1, 3, 3, stride=2), nn.Linear(3, 2)
    x = torch.randn(1, 1, 9, 9)
    found = grad_cam(Trunk(body, Mean(), head, 3), [x], lambda outputs: outputs[0, 1])
    wanted = (head.weight[1][:, None, None] * body(x)[0]).sum(0).relu() / 16
    torch.testing.assert_close(found, wanted.detach())
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    torch.testing.assert_close(
        grad_cam(Trunk(body, Mean(), head, 3), [x], lambda outputs: outputs[0, 1]), wanted.detach()
    )


@pytest.mark.parametrize(("name", "dimensions"), VECTOR)
def test_every_network_of_vectors_has_maps_and_predicts_as_without(name: str, dimensions: int) -> None:
    task = built(dimensions, name, columns={"age": [60, 10]})
    torch.manual_seed(0)
    model = task.build_model()
    one = case((34,) * dimensions, (20,) * dimensions, (4,) * dimensions, 1.0)
    said = task.predict(model, one)
    assert said.maps["cam"].shape == (34,) * dimensions
    assert said.maps["cam"].isfinite().all()
    assert all(p.grad is None for p in model.parameters())
    given = built(dimensions, name, columns={"age": [60, 10]}, cam=False).predict(model, one).scores["given"]
    assert torch.equal(given, said.scores["given"])


def test_hits_add_over_patients_and_small_cells_stay_home() -> None:
    task = built()
    heat = torch.zeros(64, 48)
    heat[21, 21] = 1
    one = case((64, 48), (20, 20), (4, 4), 1.0)
    hit = Prediction(maps={"cam": heat}, scores={"given": torch.tensor([0.2, 0.8])})
    miss = Prediction(maps={"cam": heat.flip(0)}, scores={"given": torch.tensor([0.2, 0.8])})
    other = Prediction(maps={"cam": heat}, scores={"given": torch.tensor([0.7, 0.3])})
    plain = Prediction(scores={"given": torch.tensor([0.7, 0.3])})  # of a predictor without maps
    parts = [task.score([one, one], [hit, miss]), task.score([one], [hit]), task.score([one], [other])]
    total = sum([*parts, task.score([one], [plain])], task.statistics())
    assert isinstance(total, Pointed)
    value = total.value()
    assert (value["pointing_1"], value["pointing_0"]) == (0.75, 1.0)
    assert value["pointing"] == pytest.approx(2.5 / 3)
    assert total.from_vector(total.to_vector()).value() == value
    guarded = total.guarded(2).value()
    assert "pointing_0" not in guarded
    assert guarded["pointing"] == 0.75
    assert guarded["accuracy"] == value["accuracy"]


def test_maps_need_one_place_for_each_position() -> None:
    with pytest.raises(ValueError, match=r"task\.cam is true; it needs task\.view whole \(it is tiles\)"):
        built(view="tiles")
