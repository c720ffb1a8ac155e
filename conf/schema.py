"""The plan: all that a site is asked to do. Types and bounds only; names are resolved where they are used.

A `Plan` holds names and scalars, never code paths. It travels once, as canonical JSON; every later
instruction carries its SHA-256. `Settings` adds what only the coordinator or the researcher needs.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from conf.dictionary import Label as Label
from conf.dictionary import Labels as Labels
from conf.section import Frozen as Frozen
from conf.section import Name as Name
from conf.section import Own as Own
from conf.section import Scalar as Scalar
from conf.section import Section as Section
from conf.section import SiteName as SiteName
from conf.section import Value as Value


class Local(Frozen):
    """Training at one site in one round."""

    steps: int = Field(10, ge=1, le=1_000_000)
    batch_size: int = Field(2, ge=0, le=65_536, description="patients per step; 0 = all of them")
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=100)
    momentum: float = Field(0.0, ge=0, lt=1, description="SGD only")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's momentum; 0 to 0.5 where two networks play")
    weight_decay: float = Field(0.0, ge=0, le=10)
    schedule: Literal["constant", "cosine", "step", "polynomial"] = Field(
        "constant", description="of the learning rate, over all rounds"
    )
    warmup_rounds: int = Field(0, ge=0, description="rounds of a rising rate, before the schedule")
    decay: float = Field(0.1, gt=0, le=1, description="what a step of schedule=step multiplies the rate by")
    drops: int = Field(2, ge=1, description="steps of schedule=step, evenly over the rounds")
    power: float = Field(0.9, gt=0, le=10, description="of schedule=polynomial: (1 - t)^power")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 = not clipped")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the network in training; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    threads: int = Field(1, ge=1, le=256, description="torch threads; changes bits")
    micro_chunk: int = Field(
        0, ge=0, description="examples (with DP patients) per backward pass; 0 = the batch; changes bits"
    )
    deterministic: bool = Field(False, description="only operations that repeat to the bit; slower on a GPU")
    freeze: tuple[str, ...] = Field((), description="patterns of tensors that neither train nor travel")
    freeze_depth: int = Field(0, ge=0, description="as many blocks from the input on are frozen")


class Adapt(Frozen):
    """A clip norm that follows a quantile of the norms, for a noised count of those within it."""

    quantile: float = Field(0.0, ge=0, lt=1, description="share of norms within clip; 0 = clip is fixed")
    rate: float = Field(0.2, gt=0, le=2, description="of the clip norm's geometric steps")
    count_noise: float = Field(
        2.0, gt=0.5, le=1000, description="deviation of the count's noise, in units of sigma"
    )


class Privacy(Frozen):
    """Differential privacy of patients. `none`: exact updates leave the site (simulation and public data).

    With `dpsgd` a step draws each training patient with probability `local.batch_size` / `nominal_patients`,
    clips the mean gradient over that patient's examples, and adds noise once. With `central` the unit is a
    site: its update is clipped, and the coordinator, who is trusted, adds the noise.
    """

    mode: Literal["none", "dpsgd", "central"] = "none"
    sigma: float = Field(
        0.0,
        ge=0,
        le=10_000,
        description="deviation of a step's noise, in units of clip; 0 = found for epsilon",
    )
    epsilon: float = Field(
        0.0, ge=0, le=100, description="what the whole run may cost a patient; 0 = sigma is given"
    )
    clip: float = Field(
        1.0, gt=0, le=1e6, description="largest norm of a patient's gradient; central: of a site's update"
    )
    adapt: Adapt = Adapt()
    nominal_patients: int = Field(
        0, ge=0, le=10**9, description="training patients of a site: a public number, never counted there"
    )
    examples: int = Field(1, ge=1, le=4096, description="examples of a patient in a step; their mean counts")
    delta: float = Field(1e-5, gt=0, lt=1)
    swap_norms: bool = Field(
        False, description="put GroupNorm, which sees one example, in the place of the model's BatchNorm"
    )
    metrics: Literal["home", "noised"] = Field(
        "home", description="scores of real sites; simulated ones tell exact metrics where it is home"
    )
    metrics_sigma: float = Field(
        0.0, ge=0, le=10_000, description="noise of an evaluation, in units of what one patient can move"
    )

    @model_validator(mode="after")
    def _unit(self) -> Privacy:
        """What is said of patients means nothing where the unit is a site."""
        for name in ("nominal_patients", "examples", "metrics"):
            value = getattr(self, name)
            if self.mode == "central" and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"privacy.{name} is {value!r}, but privacy.mode central protects sites; leave it out"
                )
        return self


class Federation(Frozen):
    """The round: who is asked, how many must answer, what a sum may hold."""

    rounds: int = Field(10, ge=1, le=1_000_000)
    cohort: int = Field(0, ge=0, description="sites asked per round; 0 = all")
    min_replies: int = Field(1, ge=1)
    round_timeout_s: float = Field(0.0, ge=0, description="deadline of one ask; 0 = none")
    evaluate_every: int = Field(1, ge=0, description="rounds between evaluations; 0 = only the last")
    weight: Literal["patients", "equal"] = "patients"
    max_weight: int = Field(4096, ge=1, le=2**20, description="a site's weight is capped here")
    max_value: float = Field(64.0, gt=0, le=2.0**20, description="largest |value| a reply may hold")
    scores: Literal["raw", "binned"] = "raw"
    choose: Literal["last", "best"] = Field(
        "last", description="whose round's model is the result; best: by metric on validation"
    )
    metric: str = Field(
        "",
        pattern=r"^(-?[a-z][a-z0-9_]*)?$",
        description="such as dice_mean; with a minus, or named like a loss or an error, less is better",
    )
    patience: int = Field(0, ge=0, description="evaluations without gain that end the run; 0 = never")
    ema: float = Field(
        0.0, ge=0, lt=1, description="share of the model's moving average in the next; 0 = no average"
    )

    @property
    def by_validation(self) -> bool:
        """Whether what validation says changes what the run comes to."""
        return self.choose == "best" or self.patience > 0


class Plan(Frozen):
    """What every site of a run agrees to."""

    version: Literal[1] = 1
    seed: int = Field(0, ge=0, lt=2**63)
    task: Section
    model: Section
    loss: Section
    local: Local = Local()
    strategy: Section
    privacy: Privacy = Privacy()
    federation: Federation = Federation()
    init: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the first weights; null = drawn by the seed"
    )

    @model_validator(mode="after")
    def _choice(self) -> Plan:
        """Who chooses by validation says by what, and validates."""
        f = self.federation
        if f.by_validation and not (f.metric and f.evaluate_every):
            raise ValueError(
                f"federation.metric is {f.metric!r} and evaluate_every {f.evaluate_every}; choose=best and "
                "patience need the name of a validation metric (dice_mean, -loss) and evaluations"
            )
        return self

    @model_validator(mode="after")
    def _public_numbers(self) -> Plan:
        """Under DP a site's number of patients must not show: not in a rate, nor in a weight."""
        if self.privacy.mode == "none":
            if stray := [n for n, value in Privacy() if getattr(self.privacy, n) != value]:
                raise ValueError(
                    f"privacy.{stray[0]} is {getattr(self.privacy, stray[0])}, but privacy.mode is none and "
                    "protects nobody; set privacy=dpsgd"
                )
            return self
        if (self.privacy.sigma > 0) == (self.privacy.epsilon > 0):
            sigma, epsilon = self.privacy.sigma, self.privacy.epsilon
            raise ValueError(
                f"privacy.sigma is {sigma:g} and privacy.epsilon {epsilon:g}; give one: the other follows"
            )
        if (self.privacy.metrics == "noised") != (self.privacy.metrics_sigma > 0):
            raise ValueError(
                f"privacy.metrics is {self.privacy.metrics!r} and privacy.metrics_sigma "
                f"{self.privacy.metrics_sigma:g}; noised metrics, and they alone, need a noise above 0"
            )
        size, nominal, weight = self.local.batch_size, self.privacy.nominal_patients, self.federation.weight
        patients = self.privacy.mode == "dpsgd"
        if patients and not size:
            raise ValueError(f"local.batch_size is 0; privacy.mode={self.privacy.mode} needs at least 1")
        if patients and nominal < size:
            raise ValueError(
                f"privacy.nominal_patients is {nominal}; need at least local.batch_size = {size}: the public "
                "number of training patients that a site has"
            )
        if weight != "equal":
            raise ValueError(
                f"federation.weight is {weight!r}; privacy.mode={self.privacy.mode} needs equal: how many "
                "patients a site has would be a release"
            )
        return self

    @property
    def chooses_beside_privacy(self) -> bool:
        """Whether a private run goes by exact metrics, which no noise covers."""
        private = self.privacy.mode != "none" and self.privacy.metrics == "home"
        return private and self.federation.by_validation

    def canonical(self) -> str:
        """Canonical JSON: sorted keys, no spaces. What `plan.json` holds and what travels."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Columns(Frozen):
    """The manifest's columns, and what cases without a manifest have in their place.

    Attributes:
        image: paths; none where a case is a row of the table alone.
        label: paths of masks, or classes: class columns where not every cell ends in a known suffix.
        labels: further columns of classes or values to predict.
        table: clinical columns with their type: `number`, or the list of categories.
        attribute: DICOM keyword whose text is the class, for series without a manifest.
        pages: what a TIFF of several pages is.
        colour: what pictures become: as they are, one gray channel, or three (gray ones three times).
    """

    image: str | None = "image"
    label: str | None = "label"
    patient: str | None = None
    site: str | None = None
    split: str | None = None
    labels: tuple[str, ...] = ()
    table: dict[str, Literal["number"] | tuple[str, ...]] | None = None
    attribute: str | None = None
    pages: Literal["refuse", "volume"] = "refuse"
    colour: Literal["keep", "gray", "rgb"] = "keep"


class Data(Frozen):
    """Where a simulation's cases come from (a hospital sets the same in `site.yaml`)."""

    root: str
    cache: str | None = None
    manifest: str | None = Field(None, description="CSV below root; none = DICOM or image/label folders")
    columns: Columns = Columns()
    label_map: dict[Own, int] | Literal["nonzero"] | None = Field(
        None, description="file values and names to classes; nonzero: 0 stays 0, every other value is 1"
    )
    annotates: dict[SiteName, tuple[int, ...]] | None = Field(
        None,
        description="by site, the classes that its masks of training and validation tell; other sites all",
    )
    sites: int = Field(
        0, ge=0, description="deal patients out to this many sites when there is no site column"
    )
    partition: Literal["sites", "dirichlet", "contiguous"] = Field(
        "sites",
        description="how data.sites are made: evenly (sites), with unlike shares of the classes (dirichlet), "
        "or one after another in the order of the manifest (contiguous)",
    )
    concentration: float = Field(
        0.5, ge=0.01, le=1e6, description="dirichlet: the smaller, the more unlike the sites"
    )
    least: int = Field(20, ge=1, description="dirichlet: training patients that each site has at least")
    folds: int = Field(
        0,
        ge=0,
        le=1000,
        description="parts of a cross-validation by patient; 0 = none, the split column counts",
    )
    fold: int = Field(0, ge=0, description="the part that tests, from 0")
    blocks: int = Field(
        0, ge=0, description="this many images on end count as one patient: slices of a specimen; 0 = do not"
    )
    val_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of the training patients held for validation"
    )
    test_fraction: float = Field(0.2, ge=0, lt=1, description="only where there is no split column")
    split_seed: int = Field(0, ge=0)
    plan: Literal["given", "auto"] = Field(
        "given", description="auto: patch, spacing, network, batch by rules from the data, before training"
    )
    memory_gb: float = Field(8.0, gt=0, le=10_000, description="for a training step; plan=auto only")

    @model_validator(mode="after")
    def _one_deal(self) -> Data:
        if self.folds == 1 or self.fold >= max(self.folds, 1):
            last = f"data.fold from 0 to {self.folds - 1}" if self.folds > 1 else "data.folds of 2 or more"
            raise ValueError(f"data.fold is {self.fold} of data.folds {self.folds}; need {last}")
        if self.partition != "sites" and not self.sites:
            raise ValueError(f"data.sites is 0; data.partition={self.partition} needs the number of sites")
        return self


class Run(Frozen):
    """Where the run is written."""

    dir: str | None = None
    experiment: str = "simulate"
    keep: int = Field(2, ge=1, description="checkpoints kept")


class Runtime(Frozen):
    """What carries the round. It never changes the result."""

    name: Literal["local", "ray", "flower"] = Field(
        "local", description="flower: at real sites, what wardround submit writes"
    )
    workers: int = Field(0, ge=0, le=1024, description="processes; 0 = one per core")
    ray_address: str | None = Field(None, description="cluster to join; none = start one here")
    gpus_per_site: float = Field(0.0, ge=0, le=64, description="GPUs a worker takes; ray only")
    device: str = "auto"


Baseline = Literal["pooled", "local", "trivial"]


class Settings(Frozen):
    """A simulation: the plan, and what only the one who runs it needs."""

    plan: Plan
    data: Data
    init: str | None = Field(None, description="model.init: a run's directory or a safetensors file")
    run: Run = Run()
    runtime: Runtime = Runtime()
    baselines: tuple[Baseline, ...] = ("trivial",)
    pinned: tuple[str, ...] = Field(
        (), description="settings that data.plan=auto leaves as they are: those of the command line"
    )

    @model_validator(mode="after")
    def _quorum(self) -> Settings:
        f = self.plan.federation
        if f.cohort and f.min_replies > f.cohort:
            raise ValueError(
                f"federation.min_replies is {f.min_replies}; need at most federation.cohort = {f.cohort}"
            )
        return self


def complaint(error: ValidationError, prefix: str = "") -> str:
    """One line from pydantic's first complaint: which setting, what was given, what is accepted."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = prefix + ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{where or 'setting'} is missing; it is needed"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where} is not a setting; remove it or correct its name"
    if not first["loc"]:
        return message
    return f"{where} is {first['input']!r}; {message[0].lower() + message[1:]}"
