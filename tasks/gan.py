"""Noise to case: a generator of images, and a discriminator that teaches it. 2D and 3D, by class or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from conf.schema import Section
from tasks.adversarial import DRAWS, Disguise, Game, frozen
from tasks.base import Batch, Case, Phase, Prediction, Summed
from tasks.data.resample import resample
from tasks.imaging import ImageTask, Label, Share, Sides
from tasks.losses import comparing
from tasks.metrics import Statistics
from tasks.models import network
from tasks.predict import device_of
from tasks.seeds import generator
from tasks.serving import Served
from tasks.synthesis import ClassMean, SynthesisStatistics

Count = Annotated[int, Field(ge=1, le=65_536)]


def sameness(made: Tensor, noise: Tensor) -> Tensor:
    """How little two images of one class differ for how much their noise does.

    After Mao et al. (2019, arXiv:1903.05628, equation 3). The second half of a batch has the classes of the
    first. No patient is in it, so images may be held against each other.
    """
    half = len(made) // 2
    apart = (made[:half] - made[-half:]).abs().flatten(1).mean(1)
    asked = (noise[:half] - noise[-half:]).abs().mean(1)
    return (asked / (apart + 1e-3)).mean()


class Players(nn.Module):
    """The networks of a game, under the names that frozen and kept layers are asked for by."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, player in networks.items():
            self.add_module(name, player)


class _Sampler(Players):
    """The generator alone."""

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        label = torch.zeros_like(noise[:, 0], dtype=torch.int64) if label is None else label
        made: Tensor = self.get_submodule("generator")(noise, label)
        return made


class Translator(Players):
    """The generator alone, in the way that `make` uses it."""

    def __init__(self, network: nn.Module, make: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(generator=network)
        self._make = make

    def forward(self, image: Tensor) -> Tensor:
        return self._make(self.get_submodule("generator"), image)


@dataclass(frozen=True, kw_only=True)
class Gan(ImageTask):
    """Images of noise.

    Both players see what the discriminator judges changed by chance: `flips`, `scaling`, `brightness`,
    `contrast` and `shift`, which therefore do not show in what is made.

    Attributes:
        size: sides of what is made; a case's image is resampled to them.
        discriminator: its network, by name.
        classes: names of the values of the label `label`; fewer than two: the label is not looked at.
        latent: length of the noise.
        draws: images in a step of the generator, which reads no patient.
        every: steps of the discriminator for one of the generator.
        shift: largest, as a share of a side.
        diversity: weight of `sameness` in the generator's loss.
    """

    size: Sides
    discriminator: Section = field(default_factory=lambda: Section(name="dcgan_discriminator"))
    classes: tuple[Label, ...] = ()
    label: Label = "label"
    latent: Annotated[int, Field(ge=1, le=4096)] = 64
    draws: Count = 16
    every: Count = 1
    shift: Share = 0.0
    diversity: Annotated[float, Field(ge=0, le=1000)] = 0.0
    normalise: Literal["zscore", "window", "fixed"] = "window"
    window: tuple[float, float] = (0.0, 255.0)

    @property
    def sides(self) -> tuple[int, ...]:
        """Of what is made."""
        return self.size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.unchanged(("rotation", "noise", "gamma"), "what a discriminator sees is not changed so")
        if self.normalise == "zscore":
            raise ValueError("task.normalise is 'zscore'; what is made lies between -1 and 1: use window")
        play = self.game

        def run(model: nn.Module) -> Tensor:
            label = torch.zeros(1, dtype=torch.int64)
            made: Tensor = model.get_submodule("generator")(torch.zeros(1, self.latent), label)
            play.fooled(self._critic(model, label), made)
            return made

        self.rehearse(
            "size", run, (self.channels, *self.size), "choose another size, model or task.discriminator"
        )

    @property
    def kinds(self) -> int:
        """Classes that are told apart; 0: none."""
        return len(self.classes) if len(self.classes) > 1 else 0

    @property
    def game(self) -> Game:
        """What the two play for."""
        made: Game = comparing(self.loss, "game")
        return made

    @property
    def disguise(self) -> Disguise:
        """What chance does to an image that is judged."""
        return Disguise(self.flips, self.shift, self.scaling, self.brightness, self.contrast)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The discriminator's, which reads patients, then the generator's, which reads none."""
        game, disguise = self.game, self.disguise

        def discriminate(model: nn.Module, batch: Batch | None) -> Tensor:
            here = self.patients(batch)
            label = here["label"]
            with torch.no_grad():
                fake = model.get_submodule("generator")(here["noise"], label)
            real = disguise(here["image"], here["change"])
            fake = disguise(fake, here["fake_change"])
            return game.judge(self._critic(model, label), real, fake, here["share"])

        def generate(model: nn.Module, _: Batch | None) -> Tensor:
            device = device_of(model)
            noise = torch.randn(self.draws, self.latent).to(device)
            label = (
                torch.randint(max(self.kinds, 1), (-(-self.draws // 2),)).repeat(2)[: self.draws].to(device)
            )
            change = torch.rand(self.draws, DRAWS).to(device)
            fake = model.get_submodule("generator")(noise, label)
            lost = game.fooled(self._critic(model, label, fixed=True), disguise(fake, change))
            if self.diversity and self.draws > 1:
                lost = lost + self.diversity * sameness(fake, noise)
            return lost

        return (
            Phase("discriminator", discriminate, lambda name: name.startswith("discriminator.")),
            Phase(
                "generator",
                generate,
                lambda name: name.startswith("generator."),
                private=False,
                every=self.every,
            ),
        )

    def _critic(self, model: nn.Module, label: Tensor, *, fixed: bool = False) -> Callable[[Tensor], Tensor]:
        network = model.get_submodule("discriminator")
        call = frozen(network) if fixed else network
        return lambda image: call(image, label)

    def build_model(self) -> nn.Module:
        """`generator` and `discriminator`."""
        axes, kinds = len(self.size), self.kinds
        made = {"in_channels": self.latent, "out_channels": self.channels, "sides": self.size}
        return Players(
            generator=network(self.model, "generator", dimensions=axes, classes=kinds, **made),
            discriminator=network(
                self.discriminator,
                "discriminator",
                dimensions=axes,
                classes=kinds,
                in_channels=self.channels,
            ),
        )

    def served(self, model: nn.Module) -> Served:
        """The generator: of standard normal noise, and of classes where some are told apart."""
        label = {"label": torch.zeros(2, dtype=torch.int64)} if self.kinds else {}
        return Served(
            _Sampler(generator=model.get_submodule("generator")),
            {"noise": torch.zeros(2, self.latent), **label},
            ("image", "from -1 to 1, the scale of normalised images; noise is standard normal"),
            self.settings("classes", "size"),
        )

    def class_of(self, case: Case) -> int:
        """The case's class; 0 where none are told apart.

        Raises:
            ValueError: it has none, or one beyond the plan's.
        """
        if not self.kinds:
            return 0
        found = case.labels.get(self.label)
        if found is None or found != int(found) or not 0 <= found < self.kinds:
            raise ValueError(
                f"case {case.key} has {'no' if found is None else found} label {self.label!r}; task.classes "
                f"has 0 to {self.kinds - 1}"
            )
        return int(found)

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """`image` `C *size` float32, cut to -1 to 1, and `label` int64."""
        return {"image": self.scaled(case), "label": torch.tensor(self.class_of(case))}

    def scaled(self, case: Case) -> Tensor:
        """The case's image as a generator would make it: `C *size` in -1 to 1."""
        return resample(self.normalised(self.picture(case)), self.size).clamp(-1, 1)

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """Images and classes, and for each example the draws that its loss needs.

        That a loss draws nothing itself lets DP take one patient's gradient at a time.

        Returns:
            `image` `B C *size`, `label` `B` int64, `noise` `B latent`, `change` and `fake_change` `B DRAWS`,
            `share` `B`.
        """
        count, image = len(examples), torch.stack([example["image"] for example in examples])
        drawn = {
            "noise": torch.randn(count, self.latent, generator=draw),
            "change": torch.rand(count, DRAWS, generator=draw),
            "fake_change": torch.rand(count, DRAWS, generator=draw),
            "share": torch.rand(count, generator=draw),
        }
        label = torch.stack([example["label"] for example in examples])
        return {"image": image, "label": label} | {n: t.to(image.device) for n, t in drawn.items()}

    def sample(self, model: nn.Module, label: Tensor, draw: torch.Generator) -> Tensor:
        """Images of the classes `label` (`B`): `B C *size` in -1 to 1, on the CPU."""
        noise = torch.randn(len(label), self.latent, generator=draw)
        device = device_of(model)
        made: Tensor = model.get_submodule("generator")(noise.to(device), label.to(device))
        return made.float().cpu()

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """Two made images of the case's class (`C *size`); the case lends nothing but its class."""
        label = torch.full((2,), self.class_of(case))
        first, second = self.sample(model, label, generator(0, case.key, 0, "predict", "noise"))
        return Prediction(images={self.image: first, "second": second})

    def scored(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Plain features of this patient's images and of as many made ones, by class."""
        return SynthesisStatistics.of_patient(
            [
                (self.class_of(case), self.scaled(case), made.images[self.image], made.images["second"])
                for case, made in zip(cases, predictions, strict=True)
            ],
            self.unscored(),
        )

    def unscored(self) -> SynthesisStatistics:
        """No patient."""
        return SynthesisStatistics.zero(max(self.kinds, 1), self.channels, len(self.size))

    def trivial(self) -> Mapping[str, Summed]:
        """The mean image of each class, with noise."""
        return {"class_mean": ClassMean(self)}
