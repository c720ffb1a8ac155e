"""Every network of shape `vector`: from images of any size, or features, to one vector per example."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.exits import Stop
from strategies.privacy.dpsgd import Clipper
from tasks.base import Batch, Phase
from tasks.models import GRADIENTS, MODELS, NETWORKS
from tasks.networks.norms import Standardised, swap_norms
from tasks.networks.trunk import Trunk
from tasks.networks.vit import Block, places
from tests.small_networks import section

SIDE = 32
SIZES: dict[int, list[tuple[int, ...]]] = {
    0: [()],
    2: [(32, 32), (47, 61)],
    3: [(32, 32, 32), (33, 40, 36)],
}
VECTOR = [name for name, entry in NETWORKS.items() if entry.shape == "vector"]
ENTRIES = [(name, d) for name in VECTOR for d in NETWORKS[name].dimensions]


def tiny(name: str, dimensions: int, channels: int = 1, **more: Any) -> Trunk:
    torch.manual_seed(0)
    model = MODELS.build(section(name, **more), in_channels=channels, out_channels=3, dimensions=dimensions)
    assert isinstance(model, Trunk)
    return model


def backward(value: Tensor) -> None:
    value.backward()  # type: ignore[no-untyped-call]


def drawn(dimensions: int, examples: int = 3, channels: int = 1, side: int = SIDE) -> Tensor:
    return torch.randn(examples, channels, *[side] * dimensions, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_one_vector_for_each_image_of_any_size(name: str, dimensions: int) -> None:
    model = tiny(name, dimensions, channels=3)
    for size in SIZES[dimensions]:
        x = torch.randn(2, 3, *size)
        assert model(x).shape == (2, 3)
        maps = model.maps(x)
        assert maps.shape[0] == 2
        assert maps.ndim == 2 + dimensions
        assert model.pool(maps).shape == (2, model.features)
        torch.testing.assert_close(model.head(model.pool(maps)), model(x))


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_examples_of_a_batch_do_not_see_each_other(name: str, dimensions: int) -> None:
    model = tiny(name, dimensions).train()
    for parameter in model.parameters():  # a layer that starts at zero would hide what it is told
        nn.init.normal_(parameter, std=0.1)
    x = drawn(dimensions)
    other = torch.cat([x[:1], 100 * torch.randn_like(x[1:])])
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], model(other)[0])
    assert not list(model.buffers()), "running statistics would couple patients"


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_the_gradient_reaches_the_image_and_every_parameter(name: str, dimensions: int) -> None:
    model = tiny(name, dimensions).train()
    x = drawn(dimensions).requires_grad_()
    first = model(x)
    backward(F.cross_entropy(first, torch.tensor([0, 1, 2])))
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data -= 0.01 * parameter.grad  # a head that starts at zero stops the first gradient
    model.zero_grad()
    x.grad = None
    backward(F.cross_entropy(model(x), torch.tensor([0, 1, 2])))
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters() if p.grad is not None)
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


def loss(model: nn.Module, batch: Batch | None) -> Tensor:
    if batch is None:
        raise ValueError("needs a batch")
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize(
    ("name", "dimensions"), [entry for entry in ENTRIES if GRADIENTS[entry[0]] == "vmap"]
)
def test_patients_gradients_in_one_pass_are_those_one_by_one(name: str, dimensions: int) -> None:
    model = tiny(name, dimensions).double()
    x = drawn(dimensions, 4).double()
    patients = [{"x": x[i : i + 2], "y": torch.tensor([i, 1])} for i in (0, 2)]
    phase = Phase("train", loss)
    mapped, looped = (Clipper(phase, model, clip=1e9, mapped=m).total(patients) for m in (True, False))
    for key, value in looped.items():
        assert (mapped[key] - value).abs().max() <= 1e-10, key


@pytest.mark.parametrize("name", VECTOR)
def test_same_seed_same_weights_and_bad_settings_are_refused(name: str) -> None:
    dimensions = NETWORKS[name].dimensions[0]
    a, b = tiny(name, dimensions), tiny(name, dimensions)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(Stop, match=r"model\.widht is not a setting"):
        tiny(name, dimensions, widht=3)
    with pytest.raises(Stop, match=r"model\.dimensions is 1; input should be"):
        tiny(name, 1)


# ---- norms


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.BatchNorm3d])
def test_group_norms_take_the_place_of_batch_norms(norm: type[nn.Module], affine: bool) -> None:
    model = nn.Sequential(nn.Linear(1, 6), nn.Sequential(norm(6, affine=affine), nn.ReLU())).double()
    assert swap_norms(model, 4) == ["1.0"]
    swapped = model.get_submodule("1.0")
    assert isinstance(swapped, nn.GroupNorm)
    assert swapped.num_groups == 2, "4 does not divide 6, 2 does"
    assert swapped.affine == affine
    x = torch.randn(2, 6, 5, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(swapped(x), F.group_norm(x, 2))
    assert not list(model.buffers())
    assert swap_norms(model, 4) == []


def test_a_norm_under_two_names_stays_one() -> None:
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(2, 2)})
    model["c"] = shared
    swap_norms(model, 2)
    assert isinstance(model["a"], nn.GroupNorm)
    assert model["a"] is model["c"]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_standardised_filters(dimensions: int) -> None:
    torch.manual_seed(0)
    layer = Standardised(dimensions, 3, 4, stride=2).double()
    plain = copy.deepcopy(layer)
    nn.init.normal_(layer.weight, mean=5.0, std=3.0)
    x = torch.randn(2, 3, *[9] * dimensions, dtype=torch.float64)
    rows = layer.weight.flatten(1)
    wanted = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, correction=0, keepdim=True))
    wanted = (wanted / rows.shape[1] ** 0.5).view_as(layer.weight)
    convolve = {2: F.conv2d, 3: F.conv3d}[dimensions]
    torch.testing.assert_close(layer(x), convolve(x, wanted, layer.bias, 2, 1), rtol=1e-5, atol=1e-5)
    layer.weight.data = 7 * plain.weight.data + 2
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-3, atol=1e-3)


# ---- layers of our own


def test_a_transformer_block_is_torchs() -> None:
    torch.manual_seed(0)
    ours = Block(24, 4, 36).double()
    oracle = nn.TransformerEncoderLayer(
        24, 4, 36, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    names = {
        "self_attn.in_proj_weight": "ask.weight",
        "self_attn.in_proj_bias": "ask.bias",
        "self_attn.out_proj.": "join.",
        "linear1.": "each.0.",
        "linear2.": "each.2.",
    }
    weights = ours.state_dict()
    for name, tensor in oracle.state_dict().items():
        theirs = next((name.replace(k, v) for k, v in names.items() if name.startswith(k)), name)
        tensor.copy_(weights[theirs])
    x = torch.randn(3, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), oracle(x))


def test_places_of_tokens_differ_and_lie_on_their_axes() -> None:
    found = places(torch.Size((3, 4)), torch.zeros(1, 12, 24, dtype=torch.float64)).view(3, 4, 24)
    assert (torch.cdist(found.flatten(0, 1), found.flatten(0, 1)) + torch.eye(12)).min() > 0.1
    assert torch.equal(found[2, 0, :12], found[2, 3, :12])
    assert torch.equal(found[0, 2, 12:], found[1, 2, 12:])
    rate = 1e4 ** (-1 / 6)
    torch.testing.assert_close(found[2, 0, 1], torch.tensor(2 * rate).double().sin())


def test_levels_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.blocks has 1 levels and model\.channels 2"):
        tiny("ws_resnet", 2, blocks=[1])
    with pytest.raises(ValueError, match=r"model\.heads is 5; it must divide model\.width, which is 12"):
        tiny("vit", 2, heads=5)
