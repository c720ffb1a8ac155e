"""A run's directory: what stands in it, and how it is made and opened."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import ValidationError

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from conf.schema import Baseline, Data, Plan, Runtime, Settings, complaint

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What a deployed run may be called."""


@dataclass(frozen=True)
class RunFolder:
    """`config.yaml`, `plan.json`, `run.json`; the round loop adds the rest.

    Attributes:
        id: random, made with the folder. sites: who was chosen, in a deployed run.
    """

    path: Path
    settings: Settings
    id: str
    sites: tuple[str, ...] = ()

    @classmethod
    def create(
        cls, path: Path, settings: Settings, sites: Sequence[str] = (), initial: bytes = b""
    ) -> RunFolder:
        """Make a new run directory.

        Args:
            initial: the first weights, where the plan names some.

        Raises:
            Stop: (`RUN_EXISTS`, `DISK_FULL`).
        """
        made = cls(path, settings, secrets.token_hex(16), tuple(sorted(sites)))
        with no_space(path, "start again in another run.dir"):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                raise Stop(
                    Exit.RUN_EXISTS, f"run.dir {path} exists; choose another, or: wardround resume {path}"
                ) from None
            config = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=True)
            write_atomic(path / "config.yaml", config.encode())
            write_atomic(path / "plan.json", settings.plan.canonical().encode())
            if initial:
                write_atomic(path / "initial.safetensors", initial)
            # run.json comes last: a folder with it is a whole run
            run: dict[str, object] = {"id": made.id, "started": _now()}
            if sites:
                run["sites"] = made.sites
            write_atomic(path / "run.json", json.dumps(run).encode())
        return made

    @staticmethod
    def asks_only(path: Path) -> bool:
        """Whether the run in a folder is a fingerprint, which has no scores to show."""
        try:
            return bool(json.loads((path / "plan.json").read_bytes())["strategy"]["name"] == "fingerprint")
        except (OSError, ValueError, KeyError, TypeError):
            return False  # whoever opens it will say what is wrong

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open what `create` made.

        Raises:
            Stop: (`NO_RUN`) it is not a run, or its files were changed.
        """
        try:
            run = json.loads((path / "run.json").read_bytes())
            settings = Settings.model_validate(yaml.safe_load((path / "config.yaml").read_text()))
            if (path / "plan.json").read_text() != settings.plan.canonical():
                raise Stop(
                    Exit.NO_RUN, f"{path}/plan.json and config.yaml differ; restore the one that was changed"
                )
            return cls(path, settings, run["id"], tuple(run.get("sites", ())))
        except ValidationError as error:
            raise Stop(Exit.NO_RUN, f"{path}/config.yaml: {complaint(error)}") from None
        except (OSError, json.JSONDecodeError, yaml.YAMLError, KeyError) as error:
            raise Stop(
                Exit.NO_RUN, f"{path} is not a run directory ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def named(cls, runs: Path, name: str) -> RunFolder:
        """Open a run directory by a name from outside, which is no path.

        Raises:
            Stop: (`NO_RUN`).
        """
        if not NAME.fullmatch(name):
            raise Stop(Exit.NO_RUN, f"run is {name!r}; need the name of a directory in {runs}")
        return cls.open(runs / name)

    def end(self, said: str) -> None:
        """Write down how a deployed run ended: `completed`, `stopped`, or the name of an exit code."""
        path = self.path / "run.json"
        run = json.loads(path.read_bytes()) | {"ended": _now(), "said": said}
        write_atomic(path, json.dumps(run).encode())

    def reopen(self) -> None:
        """Take an end back: the run is to go on."""
        path = self.path / "run.json"
        run = json.loads(path.read_bytes())
        write_atomic(path, json.dumps({k: v for k, v in run.items() if k not in ("ended", "said")}).encode())

    @property
    def said(self) -> str:
        """How a deployed run ended; nothing while it goes on."""
        return str(json.loads((self.path / "run.json").read_bytes()).get("said", ""))


def prepare(
    path: Path, plan: Plan, sites: Sequence[str], baselines: Sequence[Baseline] = ("trivial",)
) -> RunFolder:
    """Make the directory of a deployed run: what the coordinator reads when the run's turn comes.

    Raises:
        Stop: (`RUN_EXISTS`, `DISK_FULL`).
    """
    settings = Settings(
        plan=plan,
        data=Data(root="each site's own"),
        runtime=Runtime(name="flower"),
        baselines=tuple(baselines),
    )
    return RunFolder.create(path, settings, sites)


def deployed(path: Path) -> bool:
    """Whether it is the directory of a run at real sites."""
    try:
        return RunFolder.open(path.absolute()).settings.runtime.name == "flower"
    except Stop:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
