import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import nn

from conf.exits import Stop
from conf.schema import Section
from tasks.models import MODELS, NETWORKS

SIDE = 16
MAPS = [name for name, entry in NETWORKS.items() if entry.shape == "map"]
ENTRIES = [(name, norm, d) for name, norm, d in product(MAPS, ("instance", "group"), (2, 3))]
SMALL = {"unet": [4, 4, 8], "basic_unet": [4, 4, 4, 4, 4, 4], "dyn_unet": [4, 4, 8]}


def small(name: str, norm: str, dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = MODELS.build(
        Section(name=name, norm=norm, channels=SMALL[name]),
        in_channels=2,
        out_channels=3,
        dimensions=dimensions,
    )
    return model


def sides(name: str, dimensions: int) -> tuple[int, ...]:
    # five levels leave one voxel of 16, which an instance norm cannot take
    return (2 * SIDE if name == "basic_unet" else SIDE,) * dimensions


@pytest.mark.parametrize(("name", "norm", "dimensions"), ENTRIES)
def test_logits_have_the_shape_of_the_image(name: str, norm: str, dimensions: int) -> None:
    size = sides(name, dimensions)
    assert small(name, norm, dimensions)(torch.zeros(1, 2, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize(("name", "norm", "dimensions"), ENTRIES)
def test_examples_of_a_batch_do_not_see_each_other(name: str, norm: str, dimensions: int) -> None:
    model = small(name, norm, dimensions).train()
    x = torch.randn(2, 2, *sides(name, dimensions))
    other = torch.stack([x[0], 100 * torch.randn_like(x[1])])
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], model(other)[0])
    assert not list(model.buffers()), "running statistics would couple patients"


@pytest.mark.parametrize("name", MAPS)
def test_same_seed_same_weights(name: str) -> None:
    a, b = small(name, "instance", 2), small(name, "instance", 2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", MAPS)
def test_unknown_parameters_and_bad_values_are_refused(name: str) -> None:
    given = {"in_channels": 1, "out_channels": 2, "dimensions": 2}
    with pytest.raises(Stop, match=r"model\.widht is not a setting"):
        MODELS.build(Section(name=name, widht=3), **given)
    with pytest.raises(Stop, match=r"model\.dropout is 1\.5; input should be less than 1"):
        MODELS.build(Section(name=name, dropout=1.5), **given)
    with pytest.raises(ValueError, match=r"model\.groups is 7; it must divide every width"):
        MODELS.build(Section(name=name, norm="group", groups=7), **given)


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(Stop, match=r"model is 'vnet9'; known: .*unet"):
        MODELS["vnet9"]


def test_tables_load_no_torch() -> None:
    code = "import sys, tasks.models, tasks.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["unet", "dyn_unet"])
@pytest.mark.parametrize(
    ("pools", "sides"), [((2, 2, 1), (8, 12, 6)), ((1, 2, 0), (6, 8, 5)), ((2, 2), (8, 12))]
)
def test_pools_are_halvings_per_axis(name: str, pools: tuple[int, ...], sides: tuple[int, ...]) -> None:
    model = MODELS.build(
        Section(name=name, channels=[4, 4, 8], pools=list(pools)),
        in_channels=1,
        out_channels=2,
        dimensions=len(sides),
    )
    deepest: list[tuple[int, ...]] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.register_forward_hook(lambda _, __, out: deepest.append(tuple(out.shape[2:])))
    assert model(torch.zeros(1, 1, *sides)).shape == (1, 2, *sides)
    assert min(deepest) == tuple(n // 2**p for n, p in zip(sides, pools, strict=True))


@pytest.mark.parametrize("pools", [[1, 1, 1], [3, 2, 2], [2, 2]])
def test_pools_that_do_not_fit_the_levels_are_refused(pools: list[int]) -> None:
    with pytest.raises(ValueError, match=r"model\.pools is .*; with 3 levels and 3 axes it needs 3 numbers"):
        MODELS.build(
            Section(name="unet", channels=[4, 4, 8], pools=pools), in_channels=1, out_channels=2, dimensions=3
        )
