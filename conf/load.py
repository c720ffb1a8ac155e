"""Hydra to `Settings`: composed by name, checked by type, refused in one line.

Command lines and notebooks use this; nothing that crosses a boundary does. No configured value is
ever instantiated (`conf/screen.py`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from conf.exits import Exit, Stop
from conf.schema import Plan, Section, Settings
from conf.screen import screen, screen_folder, screen_overrides

PLAN = tuple(name for name in Plan.model_fields if name not in ("version", "init"))
REST = tuple(name for name in Settings.model_fields if name != "plan")


def compose(overrides: Sequence[str] = ()) -> Settings:
    """The settings that `overrides` give, as `wardround simulate` would have them.

    Args:
        overrides: Hydra overrides, such as `["data.root=FOLDER", "strategy=fedprox"]`.

    Raises:
        Stop: a setting is unknown, missing, of the wrong type or out of range.
    """
    with _one_line():
        screen_overrides(overrides)
        with hydra.initialize_config_module("conf", version_base="1.3"):
            return _pin(validate(hydra.compose("config", overrides=list(overrides))), overrides)


def main(argv: Sequence[str], job: Callable[[Settings], object]) -> None:
    """Run `job` once, or once per job of a sweep (`-m`), as a Hydra application.

    Hydra only composes: all jobs of a sweep are known to be valid before the first one runs.

    Args:
        argv: what stands after `wardround simulate`: overrides and Hydra's own flags.
        job: called with settings whose `run.dir` is set. What it raises ends the sweep.

    Raises:
        Stop: the arguments, or the settings they give, are refused.
    """
    jobs: list[tuple[DictConfig, Sequence[str], str]] = []

    def collect(config: DictConfig) -> None:
        sweep = HydraConfig.get()
        number = f"-{sweep.job.num}" if sweep.mode == RunMode.MULTIRUN else ""
        # as written: a reference among them is resolved, or refused, with the configuration
        given = [str(o) for o in OmegaConf.to_container(sweep.overrides.task, resolve=False) or ()]
        jobs.append((config, given, number))

    # Hydra's sweeper insists on writing a multirun.yaml: it gets a folder that goes away
    with _one_line(), tempfile.TemporaryDirectory(prefix="wardround-") as folder:
        arguments = _arguments(argv)
        arguments.overrides += [f"hydra.sweep.dir={json.dumps(folder)}", "hydra.sweep.subdir=."]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions, not Hydra's own report of them
        hydra.version.setbase("1.3")
        _run_hydra(
            args=arguments,
            args_parser=get_args_parser(),
            task_function=collect,
            config_path="pkg://conf",
            config_name="config",
        )
        now = datetime.now(UTC)
        valid = [_placed(_pin(validate(config), given), now, number) for config, given, number in jobs]
    for settings in valid:
        job(settings)


def _placed(settings: Settings, now: datetime, number: str) -> Settings:
    """The settings with `run.dir` filled in, and numbered where a sweep runs several jobs."""
    folder = settings.run.dir or f"runs/{settings.run.experiment}-{now:%Y%m%dT%H%M%SZ}"
    run = settings.run.model_copy(update={"dir": folder.rstrip("/") + number})
    return settings.model_copy(update={"run": run})


def _pin(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Note which settings were given by hand: `data.plan=auto` leaves those as they are."""
    given = (o.partition("=")[0].lstrip("+~") for o in overrides)
    pinned = {name for name in given if name.partition(".")[0] in PLAN and "." in name}
    return settings.model_copy(update={"pinned": (*settings.pinned, *sorted(pinned))})


def validate(config: DictConfig) -> Settings:
    """Composed configuration to `Settings`.

    Raises:
        Stop: (`CONFIG`, `NO_ROUNDS`) naming the setting, what was given and what is accepted.
    """
    screen(OmegaConf.to_container(config, resolve=False))
    for setting in sorted(OmegaConf.missing_keys(config)):
        raise Stop(Exit.CONFIG, f"{setting} is missing; it is needed: {setting}=VALUE")
    values = OmegaConf.to_container(config, resolve=True)
    if not isinstance(values, dict):
        raise Stop(Exit.CONFIG, f"the configuration is a {type(values).__name__}; need settings by name")
    given = {str(key): value for key, value in values.items()}
    if isinstance(given.get("model"), dict):  # where weights come from is no parameter of the network
        given["init"] = given["model"].pop("init", None)
    tree = {"plan": {k: v for k, v in given.items() if k not in REST}}
    tree |= {k: given[k] for k in REST if k in given}
    try:
        # as JSON, because strict checking there takes a list for a tuple, yet neither true nor "1" for 1
        return Settings.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise _refusal(error, given) from None
    except TypeError as error:
        raise Stop(Exit.CONFIG, f"a setting holds what JSON cannot: {error}") from None


def _arguments(argv: Sequence[str]) -> Namespace:
    """The arguments as Hydra reads them, with what could run code refused."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            arguments: Namespace = get_args_parser().parse_intermixed_args(list(argv))
    except SystemExit as stop:
        if not stop.code:
            raise
        raise Stop(Exit.USAGE, printed.getvalue().strip().rpartition("error: ")[2]) from None
    if arguments.experimental_rerun is not None:
        raise Stop(
            Exit.USAGE, "--experimental-rerun is not accepted, it reads a pickle; use wardround resume"
        )
    for folder in filter(None, (arguments.config_dir, arguments.config_path)):
        screen_folder(Path(folder))
    screen_overrides(arguments.overrides)
    return arguments


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Hydra's and OmegaConf's complaints as `Stop`."""
    try:
        yield
    except MissingConfigException as error:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        if not group or error.options is None:
            raise Stop(Exit.CONFIG, _squeeze(error)) from None
        code = Exit.UNKNOWN_NAME if _is_named(group) else Exit.CONFIG
        known = ", ".join(sorted(error.options))
        raise Stop(code, f"{group} is {option!r}; known: {known} (setting: {group})") from None
    except OverrideParseException as error:
        raise Stop(Exit.USAGE, f"{error.override!r} is not an override: {_squeeze(error)}") from None
    except Stop:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(
            cause.parent_node, DictConfig
        ):
            known = ", ".join(str(key) for key in cause.parent_node if key != "hydra")
            raise Stop(Exit.CONFIG, f"{cause.full_key} is not a setting; known here: {known}") from None
        raise Stop(Exit.CONFIG, _squeeze(error)) from None


def _is_named(group: str) -> bool:
    """Whether the group's options are entries of an extension table."""
    field = Plan.model_fields.get(group)
    return field is not None and field.annotation is Section


def _refusal(error: ValidationError, values: Mapping[str, Any]) -> Stop:
    """One line from pydantic's complaints: the setting, what was given, what is accepted."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    path, model = _setting(first["loc"])
    name = ".".join(path)
    if not path or (first["type"] == "value_error" and isinstance(first["input"], dict)):
        # a section's own word on its settings together
        return Stop(Exit.CONFIG, first["msg"].removeprefix("Value error, "))
    if first["type"] == "missing":
        return Stop(Exit.CONFIG, f"{name} is missing; it is needed: {name}=VALUE")
    if first["type"] == "extra_forbidden":
        known = ", ".join((*PLAN, *REST) if len(path) == 1 else model.model_fields)
        return Stop(Exit.CONFIG, f"{name} is not a setting; known here: {known}")
    if model is Section and path[-1] != "name":
        return Stop(Exit.CONFIG, f"{name} is nested too deep; need a value, or a list or mapping of values")
    given: Any = values
    for part in path:
        given = given[part]
    # a union complains once per member; all that is accepted belongs in the line
    accepted = dict.fromkeys(p["msg"] for p in problems if _setting(p["loc"])[0] == path)
    wanted = " or ".join(text[0].lower() + text[1:] for text in accepted)
    code = (
        Exit.NO_ROUNDS
        if name == "federation.rounds" and first["type"] == "greater_than_equal"
        else Exit.CONFIG
    )
    return Stop(code, f"{name} is {given!r}; {wanted}")


def _setting(loc: Sequence[int | str]) -> tuple[list[str], type[BaseModel]]:
    """The setting that pydantic's location means (less the members of a union), and the model it is in."""
    path: list[str] = []
    model: type[BaseModel] = Settings
    for part in loc[1:] if loc[:1] == ("plan",) else loc:
        if not path and loc[0] == "plan":
            model = Plan
        path.append(str(part))
        field = model.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        model = field.annotation
    return path, model


def _squeeze(error: object) -> str:
    return " ".join(str(error).split())
