"""Composition: the whole tree of YAML files, and every way to get a setting wrong."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from pydantic import BaseModel

from conf.exits import Exit, Stop
from conf.load import compose, main, validate
from conf.schema import Data, Federation, Local, Plan, Privacy, Runtime, Section, Settings
from strategies import STRATEGIES, build_strategy
from tasks import TASKS
from tasks.base import build_task
from tasks.losses import LOSS_TABLE, LOSSES
from tasks.models import MODELS, NETWORKS

CONF = Path(__file__).parents[2] / "conf"
ROOT = "data.root=somewhere"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("__"))
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/*.yaml"))
#: what a file leaves to its user
NEEDED = {
    "privacy/central": ["privacy.sigma=1"],
    "privacy/dpsgd": ["privacy.nominal_patients=100", "privacy.sigma=1"],
    "task/gan": ["model=dcgan", "loss=hinge"],
    "task/pix2pix": ["loss=hinge"],
    "task/cyclegan": ["loss=hinge"],
    **{
        f"loss/{name}": ["task=gan", "model=dcgan"]
        for name, entry in LOSS_TABLE.items()
        if entry.targets == "game"
    },
}
TABLES = {"task": TASKS, "model": MODELS, "loss": LOSSES, "strategy": STRATEGIES}
SECTIONS: dict[str, type[BaseModel]] = {
    "local": Local,
    "federation": Federation,
    "privacy": Privacy,
    "data": Data,
    "runtime": Runtime,
}
#: what a task gives to the builder of its model, and what the plan gives to the task
GIVEN = {"in_channels", "out_channels", "dimensions", "model", "loss"}
SHAPED = {"model": {"sides", "classes"}}  # what some shapes of network are given too


@cache
def made_of(*overrides: str) -> Settings:
    """What several tests only read: composing takes a fifth of a second."""
    return compose(overrides)


def stopped(*overrides: str) -> Stop:
    with pytest.raises(Stop, match=r"^[^\n]+$") as caught:
        compose(overrides)
    return caught.value


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_validates(file: str) -> None:
    group, option = file.split("/")
    needed = NEEDED.get(file, [])
    made = made_of(f"{'+' if group == 'experiment' else ''}{group}={option}", *needed, ROOT)
    build_strategy(made.plan)
    if group in ("task", "experiment") or (group == "loss" and LOSS_TABLE[option].targets == "map"):
        build_task(made.plan)


@pytest.mark.parametrize(
    ("model", "patch"),
    [
        (name, [32 if dimensions == 3 else 64] * dimensions)
        for name, entry in NETWORKS.items()
        for dimensions in entry.dimensions
        if entry.shape == "map"
    ],
)
def test_every_map_network_builds_for_its_dimensions(model: str, patch: list[int]) -> None:
    plan = made_of(f"model={model}", ROOT).plan
    task = plan.task.model_copy(update={"patch": patch})
    build_task(plan.model_copy(update={"task": task}))


@pytest.mark.parametrize("group", TABLES)
def test_a_table_and_its_folder_name_the_same_entries(group: str) -> None:
    # tests add toys of their own to the table of tasks
    shipped = {name for name, entry in TABLES[group].items() if not entry.__module__.startswith("tests.")}
    assert {path.stem for path in (CONF / group).glob("*.yaml")} == shipped


@pytest.mark.parametrize("file", [file for file in FILES if file.split("/")[0] in TABLES])
def test_a_named_file_has_every_parameter_at_its_default(file: str) -> None:
    group, name = file.split("/")
    values = yaml.safe_load((CONF / f"{file}.yaml").read_text())
    values = values.get(group, values)  # one that chooses a model and a loss too says where it stands
    assert values.pop("name") == name
    entry, given = TABLES[group][name], GIVEN | SHAPED.get(group, set())
    if is_dataclass(entry):
        defaults = {f.name: f.default for f in fields(entry) if f.name not in given}
        needed = {f.name for f in fields(entry) if f.default is MISSING}
    else:
        parameters = inspect.signature(entry).parameters
        defaults = {n: p.default for n, p in parameters.items() if n not in given}
        needed = {n for n, p in parameters.items() if p.default is p.empty}
    assert set(values) == set(defaults)
    for key in set(values) - needed:
        value = tuple(values[key]) if isinstance(values[key], list) else values[key]
        assert value == defaults[key], key


@pytest.mark.parametrize("group", SECTIONS)
def test_a_section_file_has_every_setting(group: str) -> None:
    for file in (file for file in FILES if file.startswith(f"{group}/")):
        made = made_of(f"{group}={Path(file).name}", *NEEDED.get(file, []), ROOT)
        section = getattr(made if group in ("data", "runtime") else made.plan, group)
        assert section.model_fields_set == set(SECTIONS[group].model_fields), file


def test_the_defaults_are_those_of_the_schema() -> None:
    made = compose([ROOT])
    assert made.plan.local == Local()
    assert made.plan.federation == Federation()
    assert made.data == Data(root="somewhere")
    assert made.runtime == Runtime()
    assert made.baselines == Settings.model_fields["baselines"].default


@pytest.mark.parametrize(
    ("overrides", "read", "wanted"),
    [
        (["strategy=fedprox", "strategy.mu=0.1"], lambda s: s.plan.strategy, Section(name="fedprox", mu=0.1)),
        (["model=unet", "model.channels=[8,16]"], lambda s: s.plan.model.parameters["channels"], [8, 16]),
        (["task=segmentation"], lambda s: s.plan.task.name, "segmentation"),
        (["run.dir=runs/x"], lambda s: s.run.dir, "runs/x"),
        (["federation.rounds=3"], lambda s: s.plan.federation.rounds, 3),
        (["runtime=local", "runtime.workers=2"], lambda s: s.runtime.workers, 2),
        (["baselines=[pooled,local]"], lambda s: s.baselines, ("pooled", "local")),
        (["data.columns.image=scan"], lambda s: s.data.columns.image, "scan"),
        (["data.label_map={0:0,255:1}"], lambda s: s.data.label_map, {0: 0, 255: 1}),
        (["data.label_map={0:0,lung left:1}"], lambda s: s.data.label_map, {0: 0, "lung left": 1}),
        (["data.label_map=nonzero"], lambda s: s.data.label_map, "nonzero"),
        (["local.lr=1"], lambda s: s.plan.local.lr, 1.0),
        (["seed=${federation.rounds}"], lambda s: s.plan.seed, 10),
        (["+experiment=lungs", "federation.rounds=2"], lambda s: s.plan.federation.rounds, 2),
    ],
)
def test_overrides_reach_the_settings(
    overrides: list[str], read: Callable[[Settings], object], wanted: object
) -> None:
    assert read(compose([*overrides, ROOT])) == wanted


@pytest.mark.parametrize(
    ("overrides", "exit", "parts"),
    [
        ([], Exit.CONFIG, ["data.root", "missing", "data.root="]),
        (["+experiment=lungs"], Exit.CONFIG, ["data.root", "missing"]),
        (["federation.rounds=0", ROOT], Exit.NO_ROUNDS, ["federation.rounds", "0", "1"]),
        (["federation.rounds=2.5", ROOT], Exit.CONFIG, ["federation.rounds", "2.5", "integer"]),
        (["federation.rounds=true", ROOT], Exit.CONFIG, ["federation.rounds", "True", "integer"]),
        (["federation.rounds='3'", ROOT], Exit.CONFIG, ["federation.rounds", "'3'", "integer"]),
        (["federation.min_replies=0", ROOT], Exit.CONFIG, ["federation.min_replies", "0", "1"]),
        (["federation.cohort=2", "federation.min_replies=3", ROOT], Exit.CONFIG, ["min_replies", "3", "2"]),
        (["local.lr=-1", ROOT], Exit.CONFIG, ["local.lr", "-1", "greater than 0"]),
        (["local.lr=nan", ROOT], Exit.CONFIG, ["local.lr", "nan", "finite"]),
        (["local.optimizer=lion", ROOT], Exit.CONFIG, ["local.optimizer", "lion", "adamw"]),
        (["local.lrr=1", ROOT], Exit.CONFIG, ["local.lrr", "not a setting", "weight_decay"]),
        (["+local.lrr=1", ROOT], Exit.CONFIG, ["local.lrr", "not a setting", "weight_decay"]),
        (["+nonsense=1", ROOT], Exit.CONFIG, ["nonsense", "not a setting", "federation"]),
        (["strategy.mu=1", ROOT], Exit.CONFIG, ["strategy.mu", "not a setting", "name"]),
        (["+strategy.mu=[[1]]", ROOT], Exit.CONFIG, ["strategy.mu", "nested"]),
        (["data.label_map={0:0,a:x}", ROOT], Exit.CONFIG, ["data.label_map", "'x'", "nonzero"]),
        (["baselines=[pooled,magic]", ROOT], Exit.CONFIG, ["baselines", "magic", "trivial"]),
        (["strategy=fedsgd", ROOT], Exit.UNKNOWN_NAME, ["strategy", "fedsgd", "fedavg", "scaffold"]),
        (["task=detection", ROOT], Exit.UNKNOWN_NAME, ["task", "detection", "segmentation"]),
        (["model=nonet", ROOT], Exit.UNKNOWN_NAME, ["model", "nonet", "unet"]),
        (["loss=tversk", ROOT], Exit.UNKNOWN_NAME, ["loss", "tversk", "dice_ce"]),
        (["runtime=moon", ROOT], Exit.CONFIG, ["runtime", "moon", "local"]),
        (["+experiment=moon", ROOT], Exit.CONFIG, ["experiment", "moon", "hippocampus"]),
        (["strategy=null", ROOT], Exit.CONFIG, ["group"]),
        (["~strategy", ROOT], Exit.CONFIG, ["strategy", "missing"]),
        (["strategy.name=../x", ROOT], Exit.CONFIG, ["strategy.name", "../x", "pattern"]),
        (["seed=${nowhere}", ROOT], Exit.CONFIG, ["nowhere"]),
        (["rubbish"], Exit.USAGE, ["rubbish"]),
        (["x=["], Exit.USAGE, ["x=["]),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(overrides: list[str], exit: Exit, parts: list[str]) -> None:
    stop = stopped(*overrides)
    assert stop.exit == exit
    for part in parts:
        assert part in str(stop)
    with pytest.raises(Stop, match=re.escape(str(stop))):
        main(overrides, print)


BOUNDED = [
    (name, key, meta.ge)
    for name, section in (("local", Local), ("federation", Federation))
    for key, field in section.model_fields.items()
    for meta in field.metadata
    if getattr(meta, "ge", None) is not None
]


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_module("conf", version_base="1.3"):
        return hydra_compose("config", overrides=[ROOT])


@pytest.mark.parametrize(("section", "key", "least"), BOUNDED)
@settings(max_examples=10, deadline=None)
@given(below=st.integers(1, 10**6))
def test_whatever_is_below_a_bound_is_refused_by_name(
    composed: DictConfig, section: str, key: str, least: int, below: int
) -> None:
    config = composed.copy()
    config[section][key] = int(least) - below
    with pytest.raises(Stop, match=rf"^{section}\.{key} is {int(least) - below}"):
        validate(config)


def run(*argv: str) -> list[Settings]:
    jobs: list[Settings] = []
    main(argv, jobs.append)
    return jobs


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_gets_a_dated_folder_and_hydra_writes_nothing(empty: Path) -> None:
    (job,) = run("+experiment=lungs", ROOT)
    assert job.run.dir is not None
    assert job.run.dir.startswith("runs/lungs-2")
    assert job.run.dir.endswith("Z")
    assert job.data.root == "somewhere"
    assert Path.cwd() == empty
    assert list(empty.iterdir()) == []


def test_a_sweep_numbers_its_folders_and_writes_nothing(empty: Path) -> None:
    jobs = run(ROOT, "-m", "run.dir=here/", "strategy=fedprox", "strategy.mu=0.1,0.2", "seed=range(0,2)")
    assert [job.run.dir for job in jobs] == ["here-0", "here-1", "here-2", "here-3"]
    assert [(job.plan.strategy.parameters["mu"], job.plan.seed) for job in jobs] == [
        (0.1, 0),
        (0.1, 1),
        (0.2, 0),
        (0.2, 1),
    ]
    assert list(empty.iterdir()) == []


def test_a_sweep_with_one_bad_job_runs_none(empty: Path) -> None:
    jobs: list[Settings] = []
    with pytest.raises(Stop, match=r"federation\.rounds is 0") as caught:
        main(["-m", ROOT, "federation.rounds=1,0"], jobs.append)
    assert caught.value.exit == Exit.NO_ROUNDS
    assert jobs == []


def test_a_failing_job_ends_a_sweep_with_its_own_error(empty: Path) -> None:
    done: list[int] = []

    def job(settings: Settings) -> None:
        done.append(settings.plan.seed)
        raise Stop(Exit.TOO_FEW_REPLIES, "nobody answered")

    with pytest.raises(Stop, match="nobody answered") as caught:
        main(["-m", ROOT, "seed=1,2"], job)
    assert caught.value.exit == Exit.TOO_FEW_REPLIES
    assert done == [1]


def test_a_jobs_own_value_error_is_not_taken_for_a_setting(empty: Path) -> None:
    def job(settings: Settings) -> None:
        raise ValueError("a defect")

    with pytest.raises(ValueError, match=r"^a defect$") as caught:
        main([ROOT], job)
    assert not isinstance(caught.value, Stop)


def printed(*argv: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        assert run(*argv) == []
    return out.getvalue()


def test_cfg_job_prints_yaml_that_validates(empty: Path) -> None:
    shown = yaml.safe_load(printed("--cfg", "job", ROOT, "strategy=ditto"))
    assert shown["model"].pop("init") is None  # a setting of the run, not of the plan
    plan = Plan.model_validate({key: shown[key] for key in Plan.model_fields if key in shown})
    assert plan == compose([ROOT, "strategy=ditto"]).plan


def test_help_names_every_group(empty: Path) -> None:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit, match="0"):
        main(["--help"], print)
    for group in GROUPS:
        assert f"\n{group}: " in out.getvalue()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--nonsense"], "--nonsense"),
        (["--experimental-rerun", "x"], "pickle"),
        (["--exp", "x"], "pickle"),
        (["--cfg", "job", "-m"], "Only one"),
    ],
)
def test_wrong_flags_are_refused(empty: Path, argv: list[str], part: str) -> None:
    with pytest.raises(Stop, match=part):
        main(argv, print)


def test_settings_given_by_hand_are_noted_and_no_others(empty: Path) -> None:
    given = [
        "+experiment=hippocampus",
        ROOT,
        "task.patch=[8,8,8]",
        "+model.pools=null",
        "local=sgd",
        "local.lr=1",
    ]
    assert compose([o for o in given if not o.startswith("+model")]).pinned == ("local.lr", "task.patch")
    assert compose([ROOT, "pinned=[task.spacing]", "seed=3"]).pinned == ("task.spacing",)
    seen: list[tuple[str, ...]] = []
    main(["-m", ROOT, "local.steps=1,2"], lambda settings: seen.append(settings.pinned))
    assert seen == [("local.steps",)] * 2
