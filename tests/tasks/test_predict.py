import pytest
import torch
from torch import Tensor, nn

from tasks.predict import sliding_window


class Pointwise(nn.Module):
    """Logits that depend on a voxel alone, so that windows must agree with the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(self.training or torch.is_grad_enabled())
        return x[:, :1] * self.scale.view(1, -1, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("sides", [(20, 17), (4, 30), (11, 9, 13), (3, 4, 5)])
def test_windows_agree_with_the_whole(sides: tuple[int, ...]) -> None:
    model, image = Pointwise(), torch.randn(1, *sides)
    got = sliding_window(model, image, (8,) * len(sides), overlap=0.5)
    with torch.no_grad():
        torch.testing.assert_close(got, model(image[None])[0].softmax(0))


@pytest.mark.parametrize("training", [True, False])
def test_evaluates_and_leaves_the_model_as_it_was(training: bool) -> None:
    model = Pointwise().train(training)
    sliding_window(model, torch.randn(1, 9, 9), (8, 8), overlap=0.25)
    assert model.training is training
    assert model.modes
    assert not any(model.modes), "in evaluation mode, without gradients"


def test_restores_the_mode_after_an_error() -> None:
    class Broken(Pointwise):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken network")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken network"):
        sliding_window(model, torch.randn(1, 9, 9), (8, 8), overlap=0)
    assert model.training


class Dropped(Pointwise):
    """The same, its input dropped by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(x))


def test_draws_of_dropout_are_averaged_and_repeat() -> None:
    model, image = Dropped(), torch.ones(1, 8, 8)
    state = torch.get_rng_state()
    got = sliding_window(model, image, (8, 8), overlap=0, draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got, sliding_window(model, image, (8, 8), overlap=0, draws=3))
    # of an input that is there (twice) or not, a voxel's average is one of four
    either = [(model.scale.detach() * x).softmax(0) for x in (0.0, 2.0)]
    four = torch.stack([either[0] + (either[1] - either[0]) * k / 3 for k in range(4)])
    apart = (got.flatten(1).T[:, None] - four).abs().amax(2)
    assert float(apart.amin(1).max()) < 1e-5
    assert set(apart.argmin(1).tolist()) == {0, 1, 2, 3}
    assert model.drop.training is model.training is True
