from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

from conf.exits import Stop
from conf.schema import Section
from strategies.privacy.preflight import fault, strays
from tasks import TASKS
from tasks.base import Batch, Case
from tasks.fidelity import FidelityStatistics
from tasks.translation import Translation, Unpaired

KINDS = ["pix2pix", "cyclegan"]


def task(name: str, dimensions: int = 2, loss: str = "least_squares", **given: Any) -> Translation:
    values = {"window": [0.0, 100.0], "patch": [8] * dimensions, "distance": 10.0, **given}
    made = TASKS.build(
        Section(name=name, discriminator={"name": "patch_gan", "width": 4, "levels": 1}, **values),
        model=Section(name=given.pop("network", "unet"), channels=[4, 8], residual_units=1),
        loss=Section(name=loss),
    )
    assert isinstance(made, Translation)
    return made


def case(number: int, dimensions: int = 2) -> Case:
    """The target is half as bright as the image, and 20 more."""
    draw = torch.Generator().manual_seed(number)
    image = torch.rand(1, *[12] * dimensions, generator=draw) * 100
    images = {"image": image, "target": image / 2 + 20}
    return Case(str(number), str(number), images, torch.eye(4), (1.0,) * dimensions)


def batch(made: Translation, count: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return made.batch([made.prepare(case(i, len(made.patch))) for i in range(count)], draw)


def players(made: Translation) -> nn.Module:
    torch.manual_seed(0)
    return made.build_model()


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_phases_read_patients_one_by_one_and_move_their_own(name: str, dimensions: int) -> None:
    made = task(name, dimensions)
    networks = players(made)
    for phase in made.phases:
        assert phase.private
        networks.zero_grad(set_to_none=True)
        losses = phase.loss(networks, batch(made, 4))
        assert losses.shape == (4,)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        moved = {n for n, p in networks.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert {n.split(".")[0] for n in moved} == {
            n.split(".")[0] for n, _ in networks.named_parameters() if phase.parameters(n)
        }
        assert fault(phase, networks, batch(made, 2)) == ""
        assert strays(phase, networks, batch(made, 2)) == ""


def test_no_patients_pair_is_learned_from_without_pairs() -> None:
    made = task("cyclegan")
    kinds = set()
    for number in range(8):
        one = case(number)
        ready = made.prepare(one)
        first = bool(ready["of_generator"])
        kinds.add(first)
        hidden = "target" if first else "image"
        other = replace(one, images={**one.images, hidden: torch.rand_like(one.images[hidden]) * 100})
        for key, tensor in made.prepare(other).items():
            assert torch.equal(tensor, ready[key])
    assert kinds == {True, False}


@pytest.mark.parametrize("name", KINDS)
def test_it_learns_a_known_mapping_above_the_identity(name: str) -> None:
    made = task(name, distance=1.0)
    networks = players(made)
    makers = [
        torch.optim.Adam(
            [p for n, p in networks.named_parameters() if phase.parameters(n)], 5e-3, (0.5, 0.99)
        )
        for phase in made.phases
    ]
    draw = torch.Generator().manual_seed(0)
    ready = [made.prepare(case(i)) for i in range(16)]
    for _ in range(120 if name == "cyclegan" else 40):
        here = made.batch(ready, draw)
        for phase, maker in zip(made.phases, makers, strict=True):
            networks.zero_grad(set_to_none=True)
            phase.loss(networks, here).mean().backward()  # type: ignore[no-untyped-call]
            maker.step()
    held = [case(100 + i) for i in range(4)]

    def psnr(predicted: list[Any]) -> float:
        total = made.statistics()
        for one, made_of in zip(held, predicted, strict=True):
            found = made.score([one], [made_of])
            assert isinstance(found, FidelityStatistics)
            total = total + found
        return total.value()["psnr"]

    identity = made.trivial()["identity"]
    plain = psnr([identity.predict(identity.zero(), one) for one in held])
    with torch.no_grad():
        assert psnr([made.predict(networks.eval(), one) for one in held]) > plain + 0.5


def test_the_affine_row_is_least_squares() -> None:
    made = task("pix2pix")
    affine = made.trivial()["affine"]
    sums = affine.zero()
    for i in range(5):
        sums = {name: value + affine.accumulate(case(i), {})[name] for name, value in sums.items()}
    found = affine.predict(affine.solve(sums, {}), case(9)).images["target"]
    torch.testing.assert_close(found, case(9).images["target"])


def test_the_ratio_is_scikit_images_and_sites_add() -> None:
    draw = np.random.default_rng(0)
    parts, wanted = [], []
    for _ in range(5):
        a, b = draw.uniform(-100, 100, (2, 1, 16, 16)).astype(np.float32)
        wanted.append(peak_signal_noise_ratio(a, b, data_range=200))  # type: ignore[no-untyped-call]
        parts.append(FidelityStatistics.of_patient([(torch.tensor(a), torch.tensor(b))], (-100.0, 100.0)))
    total = FidelityStatistics.zero()
    for part in parts:
        total = total.from_vector(total.to_vector() + part.to_vector())
    assert total.value()["psnr"] == pytest.approx(np.mean(wanted), rel=1e-6)
    half = 1.959964 * np.std(wanted, ddof=1) / np.sqrt(5)
    assert total.value()["psnr_hi"] == pytest.approx(np.mean(wanted) + half, rel=1e-6)


def test_a_soft_kernels_image_is_made_of_the_own() -> None:
    made = task("pix2pix", soften=2.0)
    alone = replace(case(0), images={"image": case(0).images["image"]})
    given, wanted = made.pair(alone)
    assert wanted is not None
    assert torch.equal(wanted, alone.images["image"])
    assert given.var() < 0.5 * wanted.var()
    torch.testing.assert_close(made.raw(made.normalised(wanted)), wanted)


@pytest.mark.parametrize("name", KINDS)
def test_an_image_smaller_than_a_patch_is_padded_by_its_border(name: str) -> None:
    made = task(name, patch=[16, 16])
    assert made.phases[1].loss(players(made), batch(made, 2)).isfinite().all()
    with torch.no_grad():
        assert made.predict(players(made), case(0)).images["target"].shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"patch": [9, 9]}, r"task.patch is \[9, 9\]; model .* cannot take it"),
        ({"normalise": "zscore"}, "task.normalise is 'zscore'"),
        ({"rotation": 9.0}, "task.rotation is 9.0; a pair's images are flipped alike"),
    ],
)
def test_what_does_not_fit_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Stop, match=message):
        task("pix2pix", **given)
    assert issubclass(Unpaired, Translation)


def test_unpaired_images_have_no_slopes() -> None:
    with pytest.raises(Stop, match=r"loss.penalty is 10 and loss.r1 0; slopes are not looked at"):
        task("cyclegan", loss="wasserstein")


def test_a_case_without_a_target_is_translated_and_not_trained_on() -> None:
    alone = replace(case(0), images={"image": case(0).images["image"]})
    with pytest.raises(ValueError, match="has no image 'target'"):
        task("pix2pix").prepare(alone)
    made = task("pix2pix")
    with torch.no_grad():
        assert made.predict(players(made), alone).images["target"].shape == case(0).images["target"].shape


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_twice_the_channels_is_a_pair(name: str) -> None:
    made, named = task(name, channels=2), case(0)
    first, second = named.images["image"].repeat(2, 1, 1), named.images["target"].repeat(2, 1, 1)
    apart = replace(named, images={"image": first, "target": second})
    joined = replace(named, images={"image": torch.cat([first, second])})
    given, wanted = made.pair(joined)
    assert wanted is not None
    assert torch.equal(given, first)
    assert torch.equal(wanted, second)
    ready = [made.prepare(one) for one in (apart, joined)]
    assert all(torch.equal(t, ready[1][n]) for n, t in ready[0].items())
    with torch.no_grad():
        said = [made.predict(players(made).eval(), one) for one in (apart, joined)]
    assert torch.equal(said[0].images["target"], said[1].images["target"])
    assert made.score([joined], said[1:]).value() == made.score([apart], said[:1]).value()
    odd = replace(named, images={"image": torch.cat([first, second[:1]])})
    with pytest.raises(ValueError, match=r"3 channels; need task\.channels=2"):
        made.prepare(odd)


def test_images_that_are_no_pair_say_which_they_are() -> None:
    made, pair = task("cyclegan"), case(0)
    single = {name: replace(pair, images={"image": image}) for name, image in pair.images.items()}
    with pytest.raises(
        ValueError, match=r"is no pair, and its label 'domain' is None; need 0 \(given\) or 1"
    ):
        made.prepare(single["image"])
    for kind, name in enumerate(("image", "target")):
        one = replace(single[name], labels={"domain": float(kind)})
        ready, wanted = made.prepare(one), pair.images[name] / 50 - 1
        own, other = (("generator", "generator_back"), ("generator_back", "generator"))[kind]
        torch.testing.assert_close(ready[own], wanted)
        assert (ready[other] == 0).all()
        assert [float(ready[f"of_{side}"]) for side in (own, other)] == [1, 0]
        with torch.no_grad():
            said = made.predict(players(made).eval(), one)
        # nothing to hold it against; a pair's patient still is
        assert made.score([one], [said]).patients == 0
        assert made.score([one, pair], [said, said]).patients == 1
        row = made.trivial()["affine"]
        assert not any(tensor.any() for tensor in row.accumulate(one, {}).values())
