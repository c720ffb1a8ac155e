"""What a federated algorithm is: both halves of it, in one frozen class of hyper-parameters.

The server half is a generator: it yields `Ask`s and receives what the sites' answers folded to, so
that averaging, cyclic transfer, buffered asynchrony and the stages of a secure sum are the same thing
to the round loop. The client half answers one stage. All memory is explicit: the server's state is a
tree that the loop checkpoints, a site's is a tree that the site keeps; neither hides in an object.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from conf.exits import Exit, Stop
from conf.schema import Plan
from strategies.exact import Fold, Folded, Sum, Total
from strategies.protocol import Refused, Spec, Tree, Update, digest, pack
from strategies.transfer import frozen
from tasks.base import Case, Prediction, Task, build_task
from tasks.networks.norms import swap_norms
from tasks.seeds import seed

MOST_ROWS = 2**20
"""Patients of whom one answer may tell the scores one by one."""

Tensors = dict[str, Tensor]
Correct = Callable[[Mapping[str, nn.Parameter]], None]
"""Changes the gradients of one step in place (`p.grad`), after clipping and noise."""


@dataclass(frozen=True)
class Study:
    """What both ends derive from a plan.

    Attributes:
        initial: the model's float tensors before round 1. Integer buffers stay home.
        trainable: names of the parameters that learn. norms: names that belong to normalisation layers.
        frozen: names of tensors that stay as they are, and do not travel.
    """

    plan: Plan
    task: Task
    initial: Tensors
    trainable: frozenset[str]
    norms: frozenset[str]
    frozen: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """The plan's."""
        return self.plan.digest

    @classmethod
    def of(cls, plan: Plan, given: Callable[[str], object] | None = None) -> Study:
        """Build the task and the initial model that `plan` names.

        Args:
            given: finds the first weights by `plan.init`; None where no weight will be looked at.

        Raises:
            Refused: (`plan`, `names`, `shape`, `finite`, …) they are not of this model, or not the plan's.
            Stop: an unknown name, a parameter out of bounds, or nothing left that learns.
        """
        task = build_task(plan)
        model = fresh_model(plan, task)
        names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        norms = {
            names[id(t)]
            for module in model.modules()
            if isinstance(module, _NORMS)
            for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        initial = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
        if plan.init is not None and given is not None:
            initial = _begun(initial, given(plan.init), plan.init)
        still = frozen(list(initial), plan.local)
        learns = frozenset(n for n, _ in model.named_parameters()) - still
        if still and (idle := [p.name for p in task.phases if not any(map(p.parameters, learns))]):
            raise Stop(Exit.CONFIG, f"local.freeze leaves nothing that phase {idle[0]!r} could train")
        return cls(plan, task, initial, learns, frozenset(norms), still)

    def fresh(self) -> nn.Module:
        """The model as it is before round 1, on the CPU; what is frozen takes no gradient."""
        model = fresh_model(self.plan, self.task)
        for name, parameter in model.named_parameters():
            if name in self.frozen:
                parameter.requires_grad_(False)
        return model


def fresh_model(plan: Plan, task: Task) -> nn.Module:
    """The model as it is before round 1, on the CPU; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed(plan.seed, "", 0, "plan", "model") % 2**32)
        model = task.build_model()
    if plan.privacy.swap_norms:
        swap_norms(model, GROUPS)
    return model


def _begun(fresh: Tensors, given: object, sha256: str) -> Tensors:
    """First weights from outside, held against the model's own form and the plan's digest."""
    update = Update.from_tree({"tensors": given, "weight": 1, "form": "plain"})
    Spec({name: (tuple(t.shape), t.dtype) for name, t in fresh.items()}, 1, 0.0).check(update)
    if digest(pack(update.tensors)) != sha256:
        raise Refused("plan", "other first weights")
    return {name: update.tensors[name] for name in fresh}


GROUPS = 8
"""Of a GroupNorm that stands in for a BatchNorm; as many of them as divide its channels."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Ask:
    """One question to several sites.

    Attributes:
        stage: which half of which handler answers; "stage/detail", unique within a round's attempt.
        down: payload for all. own: payload for one site alone.
        need: answers to wait for, of everything outstanding (asynchronous); None = all.
        least: fewer answers abandon the attempt; None = the plan's `federation.min_replies`.
        counts: an answer folded here settles its site's epoch.
    """

    sites: tuple[str, ...]
    stage: str
    down: Tree
    spec: Spec
    fold: Fold = field(default_factory=Sum)
    own: Mapping[str, Tree] = field(default_factory=dict)
    need: int | None = None
    least: int | None = None
    counts: bool = True


Round = Generator[Ask, Folded, tuple[Tensors, Tree]]


class Abandon(Exception):
    """Too few answers to go on with; the loop tries the round again, from the same state."""


class Local(Protocol):
    """What a site lends to a strategy's client half, for one stage."""

    @property
    def study(self) -> Study: ...
    @property
    def round(self) -> int: ...
    @property
    def site(self) -> str: ...
    @property
    def weight(self) -> int:
        """How much this site counts: its training patients (capped), or 1."""

    @property
    def common(self) -> Tree: ...
    @property
    def own(self) -> Tree: ...
    @property
    def state(self) -> Tree:
        """The site's settled private state; empty at first. Not to be changed."""

    def place(self, tensors: Tensors) -> Tensors:
        """The tensors on the device where training happens."""

    def fit(self, weights: Tensors, *, correct: Correct | None = None, purpose: str = "train") -> Tensors:
        """The weights after training from `weights` on the site's patients; draws are those of `purpose`.

        They are the model's own: what must outlive the next `fit` or `score` is copied by who needs it.
        """

    def loss(self, weights: Tensors) -> float:
        """Mean training loss of a model over the site's training patients, without training."""

    def score(self, weights: Tensors, split: str) -> Tensor:
        """Summed statistics of a model on a split, as a float64 vector."""

    def accumulate(self, name: str, known: Tensors) -> Tensors:
        """What an exchange of a predictor by sums adds over the training cases."""

    def score_sums(self, name: str, known: Tensors, split: str) -> Tensor:
        """Summed statistics of a predictor by sums on a split."""

    def fingerprint(self) -> Tensor:
        """Histograms of the training cases as a float64 vector, small cells suppressed."""


class Strategy:
    """Federated averaging, and the hooks that other algorithms change.

    McMahan et al., 2017 (arXiv:1602.05629), on differences: model + Σ wₖ (modelₖ − model) / Σ wₖ.
    """

    stateful = False
    """Whether sites keep private state from round to round."""

    personalises = False
    """Whether sites end up with models of their own."""

    whole = True
    """Whether sites predict with the model that travels alone: then an earlier round's can be had again."""

    fits = 1
    """How often a site trains in a round: what a round costs under DP."""

    tells = ""
    """What a site's answer says of its patients beside the trained weights; no private mode covers it."""

    scored = True
    """Whether there is a model to score as the rounds go on."""

    # ---- both ends

    def check(self, study: Study) -> None:
        """Hold the algorithm's settings against the model.

        Raises:
            Stop: (`CONFIG`) they do not suit it.
        """
        if not self.shared(study):
            raise Stop(Exit.CONFIG, "nothing that travels is left of the model: keep or freeze less of it")
        if study.plan.federation.choose == "best" and not self.whole:
            what = f"strategy {study.plan.strategy.name} leaves a part of the model at each site"
            raise Stop(Exit.CONFIG, f"federation.choose is best, but {what}, as it is after the last round")

    def shared(self, study: Study) -> tuple[str, ...]:
        """Names of the tensors that travel: not the frozen; under DP what the noise covers, no buffer."""
        private = study.plan.privacy.mode != "none"
        return tuple(
            n for n in study.initial if n not in study.frozen and (not private or n in study.trainable)
        )

    def groups(self, study: Study) -> dict[str, tuple[str, ...]]:
        """Groups of tensors in an answer to `train`, each with the names in it."""
        return {"delta": self.shared(study)}

    def spec(self, study: Study, stage: str) -> Spec:
        """The only form that an answer to `stage` may have.

        Raises:
            Refused: (`stage`) this strategy has no such stage.
        """
        federation = study.plan.federation
        kind, _, detail = stage.partition("/")
        if kind == "train":
            tensors = {
                f"{group}/{name}": (tuple(study.initial[name].shape), torch.float32)
                for group, names in self.groups(study).items()
                for name in names
            }
            return Spec(tensors, federation.max_weight, federation.max_value)
        if kind == "trivial" and (found := study.task.sums().get(detail.partition("/")[0])):
            form = {f"sums/{n}": (tuple(t.shape), torch.float64) for n, t in found.zero().items()}
            return Spec(form, 1, found.largest)
        if kind == "evaluate":
            zero = study.task.statistics()
            form = {"statistics/sum": ((zero.to_vector().numel(),), torch.float64)}
            tail = MOST_ROWS * zero.rows.shape[1] if federation.scores == "raw" else 0
            # far beyond any true one, and no sum of them or of their squares is infinite
            return Spec(form, 1, 2.0**100, tail)
        raise Refused("stage", stage)

    def stages(self, study: Study) -> dict[str, int]:
        """What a run asks each site, and how often at most (`train` stands for all of its details)."""
        rounds, every = study.plan.federation.rounds, study.plan.federation.evaluate_every
        models = ("federated", *(("personal",) if self.personalises else ()), *study.task.trivial())
        often = rounds // every + 1 if every else 1
        return {
            "train": rounds,
            **{f"trivial/{name}": found.exchanges for name, found in study.task.trivial().items()},
            **{
                f"evaluate/{name}/{split}": often
                if split == "val" and name in ("federated", "personal")
                else 1
                for name in models
                for split in ("val", "test")
            },
        }

    # ---- the coordinator's half

    def start(self, study: Study, sites: tuple[str, ...]) -> Tree:
        """The server's state before round 1."""
        return {}

    def fold(self) -> Fold:
        """How answers to `train` come together."""
        return Sum()

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        """One round over `sites`: by default one ask, then `apply`."""
        folded = yield self.train(state, model, study, sites)
        return self.apply(folded, state, model, study)

    def train(self, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Ask:
        """The ask of a training stage."""
        return Ask(sites, "train", self.down(state, model, study), self.spec(study, "train"), self.fold())

    def down(self, state: Tree, model: Tensors, study: Study) -> Tree:
        """What every site of a round gets."""
        return {"model": {name: model[name] for name in self.shared(study)}}

    def apply(self, folded: Folded, state: Tree, model: Tensors, study: Study) -> tuple[Tensors, Tree]:
        """The next model and state."""
        return moved(model, folded), state

    def says(self, task: Task, weights: Tensors) -> Callable[[Case], Prediction]:
        """What a run's result predicts for a case."""
        model = task.build_model()
        model.load_state_dict(weights, strict=False)  # integer buffers never travel, so it has none
        return lambda case: task.predict(model.eval(), case)

    # ---- the site's half

    def answer(self, stage: str, local: Local) -> tuple[Update, Tree | None]:
        """Answer one stage; the second value is the site's next private state (None: as it was)."""
        kind, _, detail = stage.partition("/")
        if kind == "train":
            return self.learn(local)
        if kind == "trivial":
            sums = local.accumulate(detail.partition("/")[0], local.common.get("known", {}))
            return Update({f"sums/{n}": t for n, t in sums.items()}), None
        if kind == "evaluate":
            return Update({"statistics/sum": self.judge(local)}), None
        raise Refused("stage", stage)

    def weights(self, local: Local) -> Tensors:
        """The model as this site uses it: what came down, completed by what it keeps to itself."""
        whole = {**local.study.initial, **local.state.get("private", {}), **local.common["model"]}
        return local.place(whole)

    def learn(self, local: Local) -> tuple[Update, Tree | None]:
        """Local training and its report."""
        start = self.weights(local)
        trained = local.fit(start, correct=self.correction(local, start))
        return self.report(local, start, trained), self.remember(local, trained)

    def correction(self, local: Local, start: Tensors) -> Correct | None:
        """What this algorithm adds to the gradients of a step."""
        return None

    def report(self, local: Local, start: Tensors, trained: Tensors) -> Update:
        """What goes up after training."""
        names = self.shared(local.study)
        return Update({f"delta/{n}": trained[n] - start[n] for n in names}, local.weight)

    def remember(self, local: Local, trained: Tensors) -> Tree | None:
        """The site's private state after training."""
        return None

    def personal(self, local: Local) -> Tensors | None:
        """The model that this site keeps for itself, where the algorithm makes one."""
        return None

    def judge(self, local: Local) -> Tensor:
        """Statistics of the model that the payload names, on the split that it names."""
        asked = local.common
        match asked["kind"]:
            case "trivial":
                return local.score_sums(asked["name"], asked.get("known", {}), asked["split"])
            case "federated":
                return local.score(self.weights(local), asked["split"])
            case "personal" if (weights := self.personal(local)) is not None:
                return local.score(weights, asked["split"])
            case "given":
                return local.score({**local.study.initial, **asked["model"]}, asked["split"])
        raise Refused("stage", str(asked["kind"])[:32])


def moved(model: Tensors, folded: Folded, group: str = "delta") -> Tensors:
    """`model` plus the mean of a group; tensors that do not travel stay as they are."""
    if not isinstance(folded, Total):
        raise TypeError("needs a Sum")
    mean = folded.mean(group)
    # each mean is made for the one who asks: added to in place
    return {name: mean[name].add_(tensor) if name in mean else tensor for name, tensor in model.items()}
