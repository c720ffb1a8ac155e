import copy
import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conf.exits import Stop
from conf.schema import Section
from strategies.privacy.dpsgd import Clipper
from strategies.privacy.preflight import fault, strays
from tasks import TASKS
from tasks.adversarial import DRAWS, Disguise, Game, slopes
from tasks.base import Case
from tasks.gan import Gan, sameness
from tasks.losses import LOSS_TABLE, LOSSES
from tasks.models import NETWORKS
from tasks.seeds import generator

GENERATORS = [name for name, entry in NETWORKS.items() if entry.shape == "generator"]
DISCRIMINATORS = [name for name, entry in NETWORKS.items() if entry.shape == "discriminator"]
GAMES = [name for name, entry in LOSS_TABLE.items() if entry.targets == "game"]
PAIRS = dict.fromkeys(
    [
        *((g, DISCRIMINATORS[0], "hinge", d) for g, d in product(GENERATORS, (2, 3))),
        *((GENERATORS[0], d, "hinge", n) for d, n in product(DISCRIMINATORS, (2, 3))),
        *((GENERATORS[0], DISCRIMINATORS[0], game, 2) for game in GAMES),
    ]
)


def gan(
    model: str = "dcgan",
    discriminator: str = "dcgan_discriminator",
    loss: str = "hinge",
    dimensions: int = 2,
    **given: Any,
) -> Gan:
    judge = {"name": discriminator, "width": 4, "levels": 2, "norm": given.pop("norm", "spectral")}
    section = {
        "normalise": "window",
        "window": [0.0, 255.0],
        "size": [8] * dimensions,
        "latent": 4,
        "draws": 3,
        "classes": ["a", "b"],
        **given,
    }
    made = TASKS.build(
        Section(name="gan", discriminator=judge, **section),
        model=Section(name=model, width=4, levels=2),
        loss=Section(name=loss),
    )
    assert isinstance(made, Gan)
    return made


def case(number: int, dimensions: int = 2, label: float | None = None) -> Case:
    """A grey square at the left or right, by its class."""
    draw = torch.Generator().manual_seed(number)
    kind = number % 2 if label is None else label
    image = torch.rand(1, *[12] * dimensions, generator=draw) * 60
    image[:, :, : int(4 + 4 * (kind > 0))] += 150
    labels = {"label": float(kind)}
    return Case(str(number), str(number), {"image": image}, torch.eye(4), (1.0,) * dimensions, labels=labels)


def batch(task: Gan, count: int = 4) -> dict[str, Tensor]:
    examples = [task.prepare(case(i, len(task.size))) for i in range(count)]
    return dict(task.batch(examples, torch.Generator().manual_seed(0)))


def players(task: Gan) -> nn.Module:
    torch.manual_seed(0)
    return task.build_model()


@pytest.mark.parametrize(("model", "discriminator", "loss", "dimensions"), PAIRS)
def test_both_players_step_and_each_moves_its_own(
    model: str, discriminator: str, loss: str, dimensions: int
) -> None:
    task = gan(model, discriminator, loss, dimensions, flips=[1], shift=0.1, scaling=0.1, contrast=0.2)
    networks = players(task)
    for phase in task.phases:
        networks.zero_grad(set_to_none=True)
        losses = phase.loss(networks, batch(task) if phase.private else None)
        assert losses.shape == (4 if phase.private else task.draws,)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        moved = {n for n, p in networks.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved
        assert all(phase.parameters(name) for name in moved)
    assert not list(networks.buffers()), "a memory that sites would average"


@pytest.mark.parametrize(("model", "discriminator", "loss", "dimensions"), PAIRS)
def test_a_patients_gradient_is_its_own_and_mapped_as_looped(
    model: str, discriminator: str, loss: str, dimensions: int
) -> None:
    task = gan(model, discriminator, loss, dimensions, flips=[0], shift=0.1, brightness=0.1)
    networks, phase = players(task), task.phases[0]
    assert fault(phase, networks, batch(task, 2)) == ""
    if all(NETWORKS[name].gradients == "vmap" for name in (model, discriminator)):
        assert strays(phase, networks, batch(task, 2)) == ""


def test_the_generator_reads_nobody_and_follows_torchs_seed() -> None:
    task, found = gan(), []
    phase = task.phases[1]
    assert not phase.private
    for _ in range(2):
        torch.manual_seed(5)
        found.append(phase.loss(players(task), None))
    assert torch.equal(*found)


def test_sameness_is_high_for_a_collapsed_generator() -> None:
    noise = torch.randn(6, 4)
    made = noise.mean(1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    assert sameness(torch.zeros(6, 1, 8, 8), noise) > 100 * sameness(made, noise)
    wanted = [
        float((noise[i] - noise[i + 3]).abs().mean() / (made[i] - made[i + 3]).abs().mean().add(1e-3))
        for i in range(3)
    ]
    assert float(sameness(made, noise)) == pytest.approx(sum(wanted) / 3, rel=1e-5)
    plain, diverse = (gan(diversity=w, draws=5).phases[1] for w in (0.0, 1.0))
    losses = []
    for phase in (plain, diverse):
        torch.manual_seed(1)
        losses.append(phase.loss(players(gan()), None).sum())
    assert losses[1] > losses[0]


def test_a_slope_is_autograds() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 1)).double()
    image = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    for i, found in enumerate(slopes(network, image)):
        alone = image[i : i + 1].clone().requires_grad_()
        (wanted,) = torch.autograd.grad(network(alone).sum(), alone)
        torch.testing.assert_close(found, wanted.pow(2).sum())


def test_the_penalty_and_its_gradient_are_those_of_plain_autograd() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 1)).double()
    real, fake = torch.randn(2, 3, 1, 8, 8, dtype=torch.float64).unbind(0)
    share = torch.rand(3, dtype=torch.float64)
    game = LOSSES.build(Section(name="wasserstein", penalty=7.0))
    losses = game.judge(network, real, fake, share)
    between = (share.view(-1, 1, 1, 1) * real + (1 - share.view(-1, 1, 1, 1)) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(network(between).sum(), between, create_graph=True)
    wanted = network(fake)[:, 0] - network(real)[:, 0] + 7 * (slope.flatten(1).norm(dim=1) - 1) ** 2
    torch.testing.assert_close(losses, wanted)
    parameters = list(network.parameters())
    for a, b in zip(
        torch.autograd.grad(losses.mean(), parameters),
        torch.autograd.grad(wanted.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", GAMES)
def test_a_game_wants_real_high_and_made_low(name: str) -> None:
    game = LOSSES.build(Section(name=name, penalty=0.0))
    assert isinstance(game, Game)
    low, high = torch.full((1, 1), 0.1), torch.full((1, 1), 0.9)
    assert game.real(high) < game.real(low)
    assert game.fake(low) < game.fake(high)
    assert game.fool(high) < game.fool(low)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_disguise_shifts_mirrors_and_changes_intensity(dimensions: int) -> None:
    image = torch.randn(1, 2, *[8] * dimensions)
    still = torch.full((1, DRAWS), 0.5)
    torch.testing.assert_close(Disguise(shift=0.25, zoom=0.5, contrast=0.5)(image, still), image)
    left = still.clone()
    left[0, 3] = 0.1
    torch.testing.assert_close(Disguise(flips=(0,))(image, left), image.flip(2))
    moved = still.clone()
    moved[0, 5 + dimensions] = 1.0  # the last axis, by a quarter of its side
    torch.testing.assert_close(Disguise(shift=0.25)(image, moved)[..., :6], image[..., 2:])
    bright = still.clone()
    bright[0, :2] = 1.0
    torch.testing.assert_close(Disguise(brightness=0.3, contrast=0.5)(image, bright), 1.5 * image + 0.3)


def test_a_spectral_layer_has_norm_one() -> None:
    torch.manual_seed(0)
    network = players(gan()).get_submodule("discriminator")
    for layer in network.get_submodule("down").children():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        largest = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
        assert 0.9 < float(largest) < 1.15


def test_it_learns_where_each_class_is_bright() -> None:
    task = gan(flips=[0], draws=16)
    networks = players(task)
    examples = [task.prepare(case(i)) for i in range(16)]
    draw = torch.Generator().manual_seed(0)
    makers = [
        torch.optim.Adam(
            [p for n, p in networks.named_parameters() if phase.parameters(n)], 2e-3, (0.0, 0.99)
        )
        for phase in task.phases
    ]
    for _ in range(100):
        for phase, maker in zip(task.phases, makers, strict=True):
            networks.zero_grad(set_to_none=True)
            loss = phase.loss(networks, task.batch(examples, draw) if phase.private else None).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            maker.step()
    with torch.no_grad():
        means = [task.sample(networks, torch.full((32,), k), draw).mean((0, 1, 2)) for k in (0, 1)]
    middle = slice(3, 5)  # columns that are bright in the second class alone
    assert means[1][middle].mean() - means[0][middle].mean() > 0.3


def test_a_prediction_repeats_and_takes_only_the_class() -> None:
    task = gan()
    networks = players(task)
    with torch.no_grad():
        one, again, other = (task.predict(networks, c) for c in (case(1), case(1), case(1, label=0.0)))
    assert torch.equal(one.images["image"], again.images["image"])
    assert not torch.equal(one.images["image"], one.images["second"])
    assert not torch.equal(one.images["image"], other.images["image"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "unet"}, "'unet' is no generator for 2D images; those are dcgan"),
        (
            {"discriminator": "dcgan"},
            "'dcgan' is no discriminator for 2D images; those are dcgan_discriminator",
        ),
        ({"loss": "dice"}, "loss is 'dice', which does not compare game; use one of: hinge"),
        ({"size": [9, 8]}, r"sides are \[9, 8\]; with model.levels=2 they must be multiples of 4"),
        ({"gamma": 0.5}, r"task.gamma is 0.5"),
        ({"normalise": "zscore"}, "task.normalise is 'zscore'"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Stop, match=message):
        gan(**given)


def test_a_case_without_its_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 2.0 label 'label'; task.classes has 0 to 1"):
        gan().prepare(case(0, label=2.0))


def test_subgroups_are_scored_apart() -> None:
    task = gan(subgroups={"sex": ["F", "M"]}, size=[12, 12])
    cases = [replace(case(k), groups={"sex": "FM"[k % 2]}) for k in range(4)]
    with torch.no_grad():
        given = [task.predict(players(task), c) for c in cases]
    total = task.statistics()
    for one, made in zip(cases, given, strict=True):
        total = total + task.score([one], [made])
    told = total.value()
    assert (told["sex_F_patients"], told["sex_M_patients"]) == (2.0, 2.0)
    assert {"frechet", "sex_F_frechet"} <= set(told) <= task.statistics().names()


def test_without_classes_the_label_is_not_looked_at() -> None:
    task = gan(classes=[])
    assert int(task.prepare(case(0, label=7.0))["label"]) == 0
    assert math.isfinite(float(task.phases[0].loss(players(task), batch(task)).mean().detach()))


def test_the_discriminator_can_be_trained_privately() -> None:
    task = gan(norm="group")
    networks = players(task)
    patients = [task.batch([task.prepare(case(i))], generator(0, "", 0, "train", str(i))) for i in range(3)]
    sums = [
        Clipper(task.phases[0], copy.deepcopy(networks), clip=0.1, mapped=mapped).total(patients)
        for mapped in (True, False)
    ]
    norm = math.sqrt(sum(float(t.square().sum()) for t in sums[0].values()))
    assert norm <= 0.3 + 1e-6
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-4, atol=1e-6)
