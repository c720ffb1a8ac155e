"""Case to image: from one rendering of a patient to another, by pairs or without. 2D and 3D."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from monai.inferers.utils import sliding_window_inference
from monai.networks.layers.simplelayers import GaussianFilter
from pydantic import Field
from torch import Tensor, nn

from conf.schema import Section
from tasks.adversarial import Game, each, frozen
from tasks.base import Batch, Case, Phase, Prediction, Summed
from tasks.data.augment import start
from tasks.fidelity import Affine, FidelityStatistics, Identity
from tasks.gan import Players, Translator
from tasks.imaging import ImageTask, Label, Sides
from tasks.losses import comparing
from tasks.metrics import Statistics
from tasks.models import network
from tasks.predict import device_of
from tasks.serving import Served

Weight = Annotated[float, Field(ge=0, le=1000)]
_OVERLAP = 0.25


@dataclass(frozen=True, kw_only=True)
class Translation(ImageTask):
    """Paired (pix2pix: Isola et al., 2017, arXiv:1611.07004): distance to the target, and a discriminator.

    Attributes:
        patch: sides of a training patch and of a prediction window.
        target: name of the image to make. Where a case's image has twice `channels` channels (a NIfTI of
            four axes), it is a pair: the first half is given, the second is the target.
        soften: mm; above 0 there is no second image: the case's own is the target, and what it is made from
            is that image under a Gaussian kernel of this deviation (a soft CT kernel; the mapping is known).
        discriminator: its network, by name.
        distance: weight of the mean absolute difference (for unpaired images of the cycle's).
        residual: whether the network makes what is added to its input.
    """

    patch: Sides
    target: Label = "target"
    soften: Annotated[float, Field(ge=0, le=100)] = 0.0
    discriminator: Section = field(default_factory=lambda: Section(name="patch_gan"))
    distance: Weight = 100.0
    residual: bool = True
    normalise: Literal["zscore", "window", "fixed"] = "window"

    @property
    def sides(self) -> tuple[int, ...]:
        """A patch's."""
        return self.patch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise == "zscore":
            raise ValueError("task.normalise is 'zscore', by which the values cannot be told: use window")
        self.unchanged(
            ("rotation", "scaling", "noise", "contrast", "brightness", "gamma"),
            "a pair's images are flipped alike and not changed else",
        )
        comparing(self.loss, "game")

        def run(model: nn.Module) -> Tensor:
            image = torch.empty(1, self.channels, *self.patch)
            for name, player in model.named_children():
                if name not in _MAKERS:
                    self._critic(player)(image)
            return self._image(model.get_submodule("generator"), image)

        self.rehearse(
            "patch", run, (self.channels, *self.patch), "choose another patch, model or task.discriminator"
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The discriminator's and the generator's; both read patients."""
        game: Game = comparing(self.loss, "game")

        def judge(model: nn.Module, batch: Batch | None) -> Tensor:
            here = self.patients(batch)
            with torch.no_grad():
                fake = self._image(model.get_submodule("generator"), here["image"])
            critic = self._critic(model.get_submodule("discriminator"))
            return game.judge(critic, here["target"], fake, here["share"])

        def make(model: nn.Module, batch: Batch | None) -> Tensor:
            here = self.patients(batch)
            fake = self._image(model.get_submodule("generator"), here["image"])
            critic = self._critic(model.get_submodule("discriminator"), fixed=True)
            return game.fooled(critic, fake) + self.distance * each((fake - here["target"]).abs())

        return (
            Phase("discriminator", judge, lambda name: name.startswith("discriminator")),
            Phase("generator", make, lambda name: name.startswith("generator")),
        )

    def _image(self, network: nn.Module, image: Tensor) -> Tensor:
        made = network(image)
        made = made[0] if isinstance(made, tuple) else made  # side outputs come after the main one
        made = image + made if self.residual else made
        result: Tensor = made
        return result

    def _critic(self, network: nn.Module, *, fixed: bool = False) -> Callable[[Tensor], Tensor]:
        call = frozen(network) if fixed else network
        return lambda image: call(image, torch.zeros(len(image), dtype=torch.int64, device=image.device))

    def _generator(self) -> nn.Module:
        made: nn.Module = network(
            self.model,
            "map",
            dimensions=len(self.patch),
            in_channels=self.channels,
            out_channels=self.channels,
        )
        return made

    def _judge(self) -> nn.Module:
        made: nn.Module = network(
            self.discriminator,
            "discriminator",
            dimensions=len(self.patch),
            in_channels=self.channels,
            classes=0,
        )
        return made

    def build_model(self) -> nn.Module:
        """`generator` and `discriminator`."""
        return Players(generator=self._generator(), discriminator=self._judge())

    def served(self, model: nn.Module) -> Served:
        """The generator (unpaired: of the target) on windows."""
        return Served(
            Translator(model.get_submodule("generator"), self._image),
            {"image": torch.zeros(2, self.channels, *self.patch)},
            (self.target, "on the scale of the normalised input"),
            self.settings("patch", "soften") | {"overlap": _OVERLAP},
        )

    def given(self, case: Case) -> Tensor:
        """What another image is made of: `C H W[D]` in raw units.

        Raises:
            ValueError: the case has none.
        """
        if both := self._both(case):
            return both[0]
        image = self.picture(case)
        if not self.soften:
            return image
        # a kernel acts within slices: those of a volume are a batch
        slices = image[None] if image.ndim == 3 else image.movedim(-1, 0)
        soft = GaussianFilter(2, [self.soften / mm for mm in case.spacing[:2]])(slices)
        made: Tensor = soft[0] if image.ndim == 3 else soft.movedim(0, -1).contiguous()
        return made

    def _both(self, case: Case) -> tuple[Tensor, Tensor] | None:
        """The halves of an image that is a pair."""
        image = case.images.get(self.image)
        if self.soften or image is None or len(image) != 2 * self.channels:
            return None
        first, second = torch.split(image.float(), self.channels)
        return first, second

    def pair(self, case: Case) -> tuple[Tensor, Tensor | None]:
        """What is given and what is wanted, None where the case has no such: `C H W[D]` in raw units.

        Raises:
            ValueError: the case has no image, or they differ in shape.
        """
        if both := self._both(case):
            return both
        given = self.given(case)
        if self.soften:
            return given, self.picture(case)
        if self.target not in case.images:
            return given, None
        wanted = case.images[self.target].float()
        if wanted.shape != given.shape:
            raise ValueError(
                f"case {case.key} has a target of shape {tuple(wanted.shape)}; need {tuple(given.shape)}"
            )
        return given, wanted

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """`image` and `target`, `C H W[D]`."""
        given, wanted = self.pair(case)
        if wanted is None:
            raise ValueError(
                f"case {case.key} has no image {self.target!r}; it has {sorted(case.images)}, of "
                f"{len(given)} channels (a pair in one file has {2 * self.channels})"
            )
        return {"image": self.normalised(given), "target": self.normalised(wanted)}

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """`image` and `target` `B C *patch`, the same place of both, and `share` `B`."""
        made = [self._cut(example, draw) for example in examples]
        names = made[0]
        share = torch.rand(len(examples), generator=draw).to(made[0]["image"].device)
        return {name: torch.stack([one[name] for one in made]) for name in names} | {"share": share}

    def _cut(self, example: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """A random patch of each image; flips along `flips`."""
        shape = example["image"].shape[1:]
        first = start(shape, self.patch, torch.zeros(0, len(shape)), 0.0, draw)
        mirrored = [1 + a for a in self.flips if torch.rand((), generator=draw) < 0.5]
        found = {}
        for name, tensor in example.items():
            if tensor.ndim == 1 + len(shape):
                found[name] = _window(tensor, first, self.patch).flip(mirrored)
            else:
                found[name] = tensor
        return found

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """The target as the network makes it, in raw units."""
        made = self._whole(model.get_submodule("generator"), self.given(case))
        return Prediction(images={self.target: self.raw(made)})

    def _whole(self, network: nn.Module, given: Tensor) -> Tensor:
        made = sliding_window_inference(
            self.normalised(given)[None].to(device_of(network)),
            self.patch,
            4,
            lambda image: self._image(network, image),
            overlap=_OVERLAP,
            mode="gaussian",
            padding_mode="replicate",
        )
        if not isinstance(made, Tensor):
            raise TypeError(f"the network returned {type(made).__name__}; need one tensor")
        return made[0].float().cpu()

    def raw(self, image: Tensor) -> Tensor:
        """The inverse of `normalised`."""
        if self.normalise == "fixed":
            return image * self.deviation + self.mean
        low, high = self.window
        return (image + 1) * ((high - low) / 2) + low

    @property
    def bounds(self) -> tuple[float, float]:
        """What intensities are cut to, in raw units."""
        return self.clip if self.normalise == "fixed" else self.window

    def scored(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """Fidelity to the target within `bounds`, the mean over this patient's cases that have one."""
        pairs = [
            (wanted, prediction.images[self.target])
            for case, prediction in zip(cases, predictions, strict=True)
            if (wanted := self.pair(case)[1]) is not None
        ]
        return FidelityStatistics.of_patient(pairs, self.bounds) if pairs else self.unscored()

    def unscored(self) -> FidelityStatistics:
        """No patient."""
        return FidelityStatistics.zero()

    def trivial(self) -> Mapping[str, Summed]:
        """What is given, as it is, and with the line through all intensities that fits best."""
        return {
            "identity": Identity(self.target, self.pair),
            "affine": Affine(self.target, self.pair, self.bounds),
        }


@dataclass(frozen=True, kw_only=True)
class Unpaired(Translation):
    """Unpaired (CycleGAN: Zhu et al., 2017, arXiv:1703.10593): two ways there and back, two discriminators.

    No patient's both images are trained on: of a pair, a digest of the patient's key says which one is.

    Attributes:
        domain: the label that says which of the two an image is that is no pair: 0 is given, 1 the target.
        same: for `distance`, how much an image counts that has what the network is to give and should come
            out as it is (section 5.2). Not for filters: one that sharpens sharpens sharp images too.
    """

    distance: Weight = 10.0
    same: Annotated[float, Field(ge=0, le=10)] = 0.5
    domain: Label = "domain"

    def __post_init__(self) -> None:
        super().__post_init__()
        game: Game = comparing(self.loss, "game")
        if game.penalty or game.r1:
            raise ValueError(
                f"loss.penalty is {game.penalty:g} and loss.r1 {game.r1:g}; slopes are not looked at where "
                "images are unpaired: 0 (not of wasserstein, which needs them)"
            )

    def build_model(self) -> nn.Module:
        """`generator` (to the target) and `generator_back`, a discriminator of what each makes."""
        return Players(
            generator=self._generator(),
            generator_back=self._generator(),
            discriminator=self._judge(),
            discriminator_back=self._judge(),
        )

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Both discriminators', both generators'; all read patients."""
        game: Game = comparing(self.loss, "game")

        def judge(model: nn.Module, batch: Batch | None) -> Tensor:
            here, loss = self.patients(batch), torch.zeros(())
            for there, back in _WAYS:
                real, fake_of = here[f"of_{back}"], here[f"of_{there}"]
                with torch.no_grad():
                    fake = self._image(model.get_submodule(there), here[there])
                critic = self._critic(model.get_submodule(_JUDGES[there]))
                loss = (
                    loss
                    + real * each(game.real(critic(here[back])))
                    + fake_of * each(game.fake(critic(fake)))
                )
            return loss

        def make(model: nn.Module, batch: Batch | None) -> Tensor:
            here, loss = self.patients(batch), torch.zeros(())
            for there, back in _WAYS:
                way, home = model.get_submodule(there), model.get_submodule(back)
                critic = self._critic(model.get_submodule(_JUDGES[there]), fixed=True)
                image = here[there]
                fake = self._image(way, image)
                cycle = each((self._image(home, fake) - image).abs())
                lost = game.fooled(critic, fake) + self.distance * cycle
                if self.same:
                    kept = each((self._image(home, image) - image).abs())
                    lost = lost + self.distance * self.same * kept
                loss = loss + here[f"of_{there}"] * lost
            return loss

        return (
            Phase("discriminator", judge, lambda name: name.startswith("discriminator")),
            Phase("generator", make, lambda name: name.startswith("generator")),
        )

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """The one image, under the name of the generator that takes it; zeros in the other's place.

        Raises:
            ValueError: the case is no pair, and does not say which of the two its image is.
        """
        given, wanted = self.pair(case)
        if wanted is None:
            first = self._kind(case) == 0
        else:
            first = hashlib.sha256(case.patient.encode()).digest()[0] % 2 == 0
        image = self.normalised(given if first or wanted is None else wanted)
        shown, none = torch.tensor(float(first)), torch.zeros_like(image)
        return {
            "image": image,
            "generator": image if first else none,
            "generator_back": none if first else image,
            "of_generator": shown,
            "of_generator_back": 1 - shown,
        }

    def _kind(self, case: Case) -> float:
        found = case.labels.get(self.domain)
        if found is None or found not in (0, 1):
            raise ValueError(
                f"case {case.key} is no pair, and its label {self.domain!r} is {found}; need 0 (given) or 1 "
                "(target) (settings: task.domain, data.columns.labels)"
            )
        return found


_MAKERS = ("generator", "generator_back")
_JUDGES = {"generator": "discriminator", "generator_back": "discriminator_back"}
_WAYS = (_MAKERS, _MAKERS[::-1])


def _window(image: Tensor, first: Sequence[int], patch: Sequence[int]) -> Tensor:
    """The patch at `first`; where the image is smaller its border is repeated."""
    spare = [max(0, p - n) for n, p in zip(image.shape[1:], patch, strict=True)]
    if any(spare):
        sides = [side for room in spare[::-1] for side in (room // 2, ceil(room / 2))]
        image = F.pad(image[None], sides, mode="replicate")[0]
    for axis, (low, p) in enumerate(zip(first, patch, strict=True), start=1):
        image = image.narrow(axis, max(low, 0), p)
    return image
