import copy
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from conf.exits import Stop
from conf.schema import Section
from tasks.models import GRADIENTS, MODELS, NETWORKS, Shape, network
from tests.small_networks import ENTRIES, LEVELS, MAPS, SIDES, SMALL, section, sides, small, takes

NORMS = ("instance", "group")


def outputs(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_logits_have_the_shape_of_the_image(name: str, dimensions: int) -> None:
    size = sides(name, dimensions)
    model, x = small(name, dimensions, inputs=2, classes=3), torch.randn(1, 2, *size)
    with torch.no_grad():
        main, *others = outputs(model(x))
        assert all(made.shape == (1, 3, *size) for made in (main, *others))
        torch.testing.assert_close(model.eval()(x), main)  # nothing of chance in it, and the main ones first


@pytest.mark.parametrize(
    ("name", "dimensions", "settings"),
    [(*entry, {}) for entry in ENTRIES]
    + [(name, 2, {"norm": n}) for name, d in ENTRIES for n in NORMS if takes(name, "norm") and d == 2],
)
def test_examples_of_a_batch_do_not_see_each_other(
    name: str, dimensions: int, settings: dict[str, Any]
) -> None:
    model = small(name, dimensions, inputs=2, **settings).train()
    size = sides(name, dimensions) if not settings or name in SIDES else (32, 32)
    x = torch.randn(2, 2, *size)
    other = torch.stack([x[0], 100 * torch.randn_like(x[1])])
    with torch.no_grad():
        for a, b in zip(outputs(model(x)), outputs(model(other)), strict=True):
            torch.testing.assert_close(a[0], b[0])
    floats = [n for n, b in model.named_buffers() if b.is_floating_point()]
    assert not floats, "running statistics would couple patients"


@pytest.mark.parametrize(("name", "dimensions"), ENTRIES)
def test_same_seed_same_weights_and_all_of_them_move(name: str, dimensions: int) -> None:
    a, b = small(name, dimensions), small(name, dimensions)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    draw = torch.Generator().manual_seed(0)
    made = outputs(a(torch.randn(1, 1, *sides(name, dimensions), generator=draw)))
    torch.stack([each.square().mean() for each in made]).sum().backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in a.named_parameters() if p.grad is None] == []
    copy.deepcopy(a)  # nothing of the graph is left in it


@pytest.mark.parametrize("name", MAPS)
def test_unknown_parameters_and_bad_values_are_refused(name: str) -> None:
    with pytest.raises(Stop, match=r"model\.widht is not a setting"):
        MODELS.build(section(name, widht=3), in_channels=1, out_channels=2, dimensions=3)
    if takes(name, "dropout"):
        with pytest.raises(Stop, match=r"model\.dropout is 1\.5; input should be less than"):
            small(name, 3, dropout=1.5)
    if takes(name, "norm"):
        with pytest.raises(ValueError, match=r"model\.groups is 7; it must divide every width"):
            small(name, 3, norm="group", groups=7)


def test_every_entry_declares_how_it_gives_gradients() -> None:
    assert set(SMALL) <= set(MODELS)
    assert set(GRADIENTS) == set(MODELS)
    assert set(GRADIENTS.values()) <= {"vmap", "loop", "no DP"}


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(Stop, match=r"model is 'vnet9'; known: .*unet"):
        MODELS["vnet9"]


def test_tables_load_no_torch() -> None:
    code = "import sys, tasks.models, tasks.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in MAPS if takes(name, "pools")])
@pytest.mark.parametrize(
    ("pools", "sides"), [((2, 2, 1), (8, 12, 6)), ((1, 2, 0), (6, 8, 5)), ((2, 2), (8, 12))]
)
def test_pools_are_halvings_per_axis(name: str, pools: tuple[int, ...], sides: tuple[int, ...]) -> None:
    model = small(name, len(sides), pools=list(pools)).eval()
    deepest: list[tuple[int, ...]] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            layer.register_forward_hook(lambda _, __, out: deepest.append(tuple(out.shape[2:])))
    assert model(torch.zeros(1, 1, *sides)).shape == (1, 2, *sides)
    assert min(deepest) == tuple(n // 2**p for n, p in zip(sides, pools, strict=True))


@pytest.mark.parametrize("pools", [[1, 1, 1], [3, 2, 2], [2, 2]])
def test_pools_that_do_not_fit_the_levels_are_refused(pools: list[int]) -> None:
    with pytest.raises(ValueError, match=r"model\.pools is .*; with 3 levels and 3 axes it needs 3 numbers"):
        MODELS.build(Section(name="unet", **LEVELS, pools=pools), in_channels=1, out_channels=2, dimensions=3)


def test_side_outputs_are_counted() -> None:
    x = torch.zeros(1, 1, 64, 64)
    assert isinstance(small("dyn_unet", 2, deep_supervision=0)(x), Tensor)
    assert len(small("dyn_unet", 2, channels=[4, 4, 4, 4, 4], deep_supervision=3)(x)) == 4  # main and three
    assert len(small("unet_plus_plus", 2)(x)) == 4
    with pytest.raises(ValueError, match=r"model\.deep_supervision is 2; 3 levels have at most 1"):
        small("dyn_unet", 2, deep_supervision=2)


@pytest.mark.parametrize(
    ("name", "shape"), [(n, s) for n, e in NETWORKS.items() for s in get_args(Shape) if s != e.shape]
)
def test_a_network_of_another_shape_is_refused_with_those_that_fit(name: str, shape: Shape) -> None:
    with pytest.raises(Stop, match=f"'{name}' is no .* for 2D images; those are ") as stop:
        network(Section(name=name), shape, dimensions=2, in_channels=1)
    named = str(stop.value).rpartition("those are ")[2].split(", ")
    assert named == [n for n, e in NETWORKS.items() if e.shape == shape and 2 in e.dimensions]
