"""Case to vector: a case gets a class, findings, a grade, a value. From images, bags, tables, features."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from conf.schema import Section
from tasks.base import Batch, Case, Phase, Prediction, Summed
from tasks.data.augment import turned
from tasks.data.resample import resample
from tasks.evidence import grad_cam
from tasks.features import FEATURES, Extractor
from tasks.imaging import Change, Classes, ImageTask, Label, Sides, one_of
from tasks.linear import Components, Logistic, Prior, Ridge
from tasks.losses import comparing
from tasks.metrics import Statistics
from tasks.models import network
from tasks.networks.reader import Reader
from tasks.predict import device_of, evaluated
from tasks.scoring.classes import KINDS
from tasks.scoring.pointing import pointed, points
from tasks.serving import Served
from tasks.targets import TARGETS, Target
from tasks.temperature import Temperature
from tasks.views import VIEWS

Positive = Annotated[float, Field(gt=0)]
Categories = Annotated[int, Field(ge=1, le=4096)]
_CHANGES = ("flips", "rotation", "scaling", "shift", "noise", "contrast", "brightness", "gamma")
#: what the linear row looks at, by axes of the image
PLAIN = {2: Section(name="hog"), 3: Section(name="thumbnail")}


@dataclass(frozen=True, kw_only=True)
class Classification(ImageTask):
    """Prediction of a vector from one image, a bag of instances of it, its table, or fixed features.

    Attributes:
        target: what the labels are, see `tasks.targets`. labels: their names in a case.
        classes: names of the classes or levels, where the target is one label.
        size: sides of the network's input; the whole image (or instance) is stretched onto it.
        view: how an image becomes instances, see `tasks.views`. instances: how many (planes are three, of
            tiles the largest square number that is not more). pool: how they come
            together, see `tasks.networks.pooling`.
        columns: of the case's table (`data.columns.table`): mean and deviation that a number is scaled by,
            or how many categories.
        features: fixed ones that a network of vectors is given in the image's place, see `tasks.features`.
        shift: largest shift in training, in shares of a side.
        mixup: α of Beta(α, α), by which examples of a batch are mixed (Zhang et al., 2018,
            arXiv:1710.09412); 0: they are not.
        scale: of continuous labels: mean and deviation, public numbers, that the network's outputs are in
            units of; a prediction is in the label's own.
        dropout_samples: predictions with dropout left on that are averaged (Gal and Ghahramani, 2016,
            arXiv:1506.02142), their deviation beside them as `spread`; 0: one without.
        cam: whether a prediction has the map `cam`, where the network finds what it says, on the case's
            own grid. Its largest value is in the mask `mask` or not: `pointing`, where a case has one.
    """

    target: Annotated[str, one_of(TARGETS)] = "classes"
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=256)] = ("label",)
    classes: Classes = ("negative", "positive")
    size: Sides
    view: Annotated[str, one_of(VIEWS)] = "whole"
    instances: Annotated[int, Field(ge=1, le=1024)] = 16
    pool: Section = field(default_factory=lambda: Section(name="attention"))
    columns: Mapping[Label, tuple[float, Positive] | Categories] | None = None
    features: Section | None = None
    shift: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    mixup: Change = 0.0
    scale: Mapping[Label, tuple[float, Positive]] | None = None
    dropout_samples: Annotated[int, Field(ge=0, le=1000)] = 0
    cam: bool = False
    mask: Label = "mask"

    @property
    def sides(self) -> tuple[int, ...]:
        """The network's input's."""
        return self.size

    def __post_init__(self) -> None:
        super().__post_init__()
        # it knows as many classes or labels as there are
        some = torch.zeros(1, self._target.outputs)
        truth = torch.zeros(1, dtype=torch.int64) if self._target.single else some
        comparing(self.loss, self.target)(some, truth)
        if self.mixup and not self._target.shares:
            raise ValueError(f"task.mixup is {self.mixup:g}; it mixes classes, task.target is {self.target}")
        self._check_view()
        self.rehearse(
            "size",
            lambda model: model(*(torch.empty(1, *shape) for shape in self._shapes())),
            (self._target.outputs,),
            "choose another size, model or view",
        )
        if self.dropout_samples:
            self.check_dropout(self.dropout_samples)
        if self.scale and (self._target.probable or set(self.scale) - set(self.labels)):
            raise ValueError(
                f"task.scale has {', '.join(self.scale)}; it is of the labels ({', '.join(self.labels)}) of "
                f"target continuous (it is {self.target})"
            )
        if self.cam and (VIEWS[self.view].bag or self.features is not None or not self._target.probable):
            raise ValueError(
                f"task.cam is true; it needs task.view whole (it is {self.view}), no task.features, and a "
                f"target of probabilities (it is {self.target})"
            )

    def _check_view(self) -> None:
        """Its instances are as many as asked for, and of as many axes as `size`."""
        view = VIEWS[self.view]
        if len(self.size) not in view.sides:
            axes = " or ".join(map(str, view.sides))
            raise ValueError(f"task.size is {list(self.size)}; view {self.view} takes {axes} sides")
        if self.features is not None:
            self.unchanged(_CHANGES, "task.features are of the images as they are")
            if view.bag:
                raise ValueError(f"task.view is {self.view!r}; task.features are of the whole image: whole")

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of the network's inputs."""
        if self._extractor is not None:
            return [(self._extractor.size + self._width,)]
        view = VIEWS[self.view]
        bag = (view.count(self.instances),) if view.bag else ()
        return [(*bag, self.channels, *self.size), *([(self._width,)] if self.columns else [])]

    @cached_property
    def _target(self) -> Target:
        return TARGETS[self.target](self.labels, self.classes)

    @cached_property
    def _extractor(self) -> Extractor | None:
        return None if self.features is None else self._built(self.features)

    def _built(self, features: Section) -> Extractor:
        made: Extractor = FEATURES.build(features, channels=self.channels, dimensions=self._axes)
        return made

    @property
    def _axes(self) -> int:
        """Of a case's image."""
        return len(self.size) + VIEWS[self.view].axes

    @property
    def _width(self) -> int:
        """Numbers that the table comes to."""
        return sum(kind + 1 if isinstance(kind, int) else 2 for kind in (self.columns or {}).values())

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One: the loss between the network's outputs and the target."""
        criterion, inputs = comparing(self.loss, self.target), self._inputs

        def loss(model: nn.Module, batch: Batch | None) -> Tensor:
            here = self.patients(batch)
            value: Tensor = criterion(model(*(here[name] for name in inputs)), here["target"])
            return value

        return (Phase("train", loss),)

    @property
    def _inputs(self) -> tuple[str, ...]:
        if self.features is not None:
            return ("vector",)
        return ("image", "table") if self.columns else ("image",)

    def build_model(self) -> nn.Module:
        """The network the plan names, for this task's inputs and target."""
        outputs = self._target.outputs
        if self._extractor is not None:
            width = self._extractor.size + self._width
            vector: nn.Module = network(
                self.model, "vector", dimensions=0, in_channels=width, out_channels=outputs
            )
            return vector
        trunk: nn.Module = network(
            self.model,
            "vector",
            dimensions=len(self.size),
            in_channels=self.channels,
            out_channels=outputs,
        )
        if not VIEWS[self.view].bag and not self.columns:
            return trunk
        return Reader.of(trunk, self.pool if VIEWS[self.view].bag else None, self._width, outputs)

    def served(self, model: nn.Module) -> Served:
        """The network on what a case is prepared to."""
        shapes = zip(self._inputs, self._shapes(), strict=True)
        names = ("target", "labels", "scale", "size", "view", "columns", "features", "dropout_samples")
        classes = ("classes",) if self._target.single else ()
        return Served(
            model,
            {name: torch.zeros(2, *shape) for name, shape in shapes},
            ("logits", self._target.reading),
            self.settings(*classes, *names),
        )

    def prepare(self, case: Case) -> dict[str, Tensor]:
        """The network's inputs and the target.

        Returns:
            `image` `[N] C *size` float32 and, with columns, `table` `T`; or `vector` `F`; and `target`.

        Raises:
            ValueError: the case has no such image or label, or they do not suit the plan.
        """
        target = self._target.encode(case)
        if self.scale:
            middle, unit = self._units
            target = (target - middle) / unit
        return {**self._read(case), "target": target}

    @property
    def _units(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each label."""
        pairs = [(self.scale or {}).get(name, (0.0, 1.0)) for name in self.labels]
        middle, unit = torch.tensor(pairs).T
        return middle, unit

    def _read(self, case: Case) -> dict[str, Tensor]:
        if self._extractor is not None:
            return {"vector": self._vector(case, self._extractor)}
        image = self.normalised(self.picture(case, VIEWS[self.view].axes))
        made = {"image": VIEWS[self.view].cut(image, self.size, self.instances)}
        return {**made, "table": self._table(case)} if self.columns else made

    def _vector(self, case: Case, extractor: Extractor) -> Tensor:
        """Features and table in one: float32."""
        if not extractor.size:
            return self._table(case)
        image = self.normalised(self.picture(case, VIEWS[self.view].axes))
        return torch.cat([extractor(image), self._table(case)])

    def _table(self, case: Case) -> Tensor:
        """The declared columns: a scaled number (missing: 0) or its category, and whether it is missing.

        Raises:
            ValueError: a category beyond those declared.
        """
        parts = []
        for name, kind in (self.columns or {}).items():
            value = case.table.get(name)
            if isinstance(kind, int):
                if value is not None and (value != int(value) or not 0 <= value < kind):
                    raise ValueError(
                        f"case {case.key} has {value:g} as {name!r}; task.columns.{name} is {kind}: 0 to "
                        f"{kind - 1}"
                    )
                made = torch.zeros(kind + 1)
                made[kind if value is None else int(value)] = 1
            else:
                scaled = 0.0 if value is None else (value - kind[0]) / kind[1]
                made = torch.tensor([scaled, float(value is None)])
            parts.append(made)
        return torch.cat(parts) if parts else torch.zeros(0)

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """The prepared inputs, images turned and changed by chance, one draw an example, `B …`."""
        made = {name: torch.stack([e[name] for e in examples]) for name in (*self._inputs, "target")}
        if "image" in made:
            made["image"] = self._changed(made["image"], draw)
        return self._mixed(made, draw) if self.mixup else made

    def _changed(self, image: Tensor, draw: torch.Generator) -> Tensor:
        change, n, axes = self.change, len(image), len(self.size)
        matrices = torch.stack([change.matrix(axes, draw) for _ in range(n)])
        shifts = (torch.rand((n, axes), generator=draw, dtype=torch.float64) * 2 - 1) * self.shift
        if self.flips or self.rotation or self.scaling or self.shift:
            # instances of a bag are channels here: what happens to one happens to all
            flat = image.flatten(1, 2) if VIEWS[self.view].bag else image
            image = turned(flat, matrices, shifts).view_as(image)
        return change.intensities(image, draw)

    def _mixed(self, made: dict[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
        """Each example with another one of the batch; the target becomes shares of classes."""
        n = len(made["target"])
        chance = np.random.default_rng(int(torch.randint(2**31, (), generator=draw)))
        kept = torch.from_numpy(chance.beta(self.mixup, self.mixup, n)).float()
        other = torch.randperm(n, generator=draw)
        made["target"] = nn.functional.one_hot(made["target"], len(self.classes)).float()
        for name, tensor in made.items():
            share = kept.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))
            made[name] = share * tensor + (1 - share) * tensor[other.to(tensor.device)]
        return made

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        """`given`: probabilities of the classes or findings, or the values; float64."""
        read, draws = self._read(case), self.dropout_samples
        inputs = [read[name][None].to(device_of(model)) for name in self._inputs]
        with torch.no_grad(), evaluated(model, dropout=draws > 0):
            rows = torch.cat([model(*inputs) for _ in range(max(draws, 1))])
        given = self._target.decode(rows.double()).cpu()
        if self.scale:
            middle, unit = self._units
            given = given * unit + middle
        scores = {"given": given.mean(0), **({"spread": given.std(0, correction=0)} if draws else {})}
        if not self.cam:
            return Prediction(scores=scores)
        found = grad_cam(model.eval(), inputs, self._target.evidence)
        # the image was stretched onto the input, and is stretched back
        return Prediction(maps={"cam": resample(found[None].cpu(), self._grid(case))[0]}, scores=scores)

    def _grid(self, case: Case) -> tuple[int, ...]:
        return tuple(case.images[self.image].shape[1:])

    def scored(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        """This patient's cases that have a label."""
        rows = []
        for case, prediction in zip(cases, predictions, strict=True):
            if any(name in case.labels for name in self.labels):
                rows.append((self._target.encode(case), prediction.scores["given"]))
        if not rows:
            return self.unscored()
        truth, given = (torch.stack(part).double() for part in zip(*rows, strict=True))
        made = KINDS[self.target].of_patient(cases[0].patient, truth, given)
        return pointed(made, self._target.columns, self._hits(cases, predictions)) if self.cam else made

    def _hits(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> list[tuple[int, bool]]:
        """Of each case with a map and a mask: what is predicted, and whether the map points into the mask."""
        return [
            (int(said.scores["given"].argmax()), points(said.maps["cam"], case.masks[self.mask] > 0))
            for case, said in zip(cases, predictions, strict=True)
            if self.mask in case.masks and "cam" in said.maps
        ]

    def unscored(self) -> Statistics:
        """No patient."""
        zero = KINDS[self.target].zero(self._target.columns)
        return pointed(zero, self._target.columns, []) if self.cam else zero

    def reads(self) -> Mapping[str, Collection[str]]:
        """Clinical columns and subgroups."""
        return {**super().reads(), "task.columns": tuple(self.columns or ())}

    def trivial(self) -> Mapping[str, Summed]:
        """The mean, and least squares on plain features (of a table where the network reads one alone)."""
        return {"constant": Prior(self._target), "linear": Ridge(self._target, *self._plain())}

    def sums(self) -> Mapping[str, Summed]:
        """The trivial ones, principal components; of probabilities logistic regression and a temperature."""
        plain = self._target, *self._plain()
        found = {**self.trivial(), "pca": Components(*plain)}
        if self._target.probable:
            found["logistic"] = Logistic(*plain)
            found["calibrated"] = Temperature(self._target, self.build_model, self.predict)
        return found

    def _plain(self) -> tuple[Callable[[Case], Tensor], int]:
        extractor = self._extractor or self._built(PLAIN[self._axes])
        return lambda case: self._vector(case, extractor), extractor.size + self._width
