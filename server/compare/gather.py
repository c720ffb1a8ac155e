"""The runs of a comparison: which are folds of one experiment, which are other methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from conf.exits import Exit, Stop
from conf.schema import Settings
from server.compare.resample import Repeat, Scored, Series
from server.report.table import Record, final, records
from server.runfolder import RunFolder

#: what may differ between the runs of one experiment
_SAME = ("plan.seed", "data.fold", "data.split_seed", "data.cache", "run", "runtime", "pinned", "baselines")
#: what makes patients and truth what they are
_DATA = ("root", "manifest", "label_map", "folds", "blocks")
_COLUMNS = ("image", "label", "patient", "labels")


@dataclass(frozen=True)
class One:
    """A run that was scored."""

    path: Path
    settings: Settings
    found: tuple[Record, ...]

    @classmethod
    def open(cls, path: Path) -> One:
        """Open a run directory.

        Raises:
            Stop: (`NO_RUN`) it is none, or nothing was evaluated yet.
        """
        found = records(path)
        if not found:
            raise Stop(Exit.NO_RUN, f"{path} has no evaluation yet; continue it with wardround resume")
        return cls(path, RunFolder.open(path).settings, tuple(found))

    @property
    def split(self) -> str:
        """What its last evaluation is over."""
        return "test" if any(record["split"] == "test" for record in self.found) else "val"

    @property
    def repeat(self) -> Repeat:
        """The seeds of split and training."""
        return self.settings.data.split_seed, self.settings.plan.seed

    @cached_property
    def last(self) -> Mapping[tuple[str, str], Record]:
        """The final record of each model at each site."""
        return final(self.found)

    @cached_property
    def scored(self) -> Mapping[str, Scored]:
        """Patients' own scores, by model; empty where the run kept none.

        Raises:
            Stop: (`NO_RUN`) a file of them is damaged.
        """
        made = {}
        for file in sorted((self.path / "scores").glob(f"*-{self.split}.safetensors")):
            try:
                with safe_open(file, framework="numpy") as held:
                    about = json.loads(held.metadata()["wardround"])
                    rows, site = held.get_tensor("rows"), held.get_tensor("site")
                made[str(about["model"])] = Scored(
                    tuple(about["columns"]),
                    rows.astype(np.float64),
                    np.array(about["sites"], dtype=str)[site],
                )
            except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError) as error:
                raise Stop(Exit.NO_RUN, f"{file} is damaged ({error}); run that fold again") from None
        return made

    @cached_property
    def kind(self) -> dict[str, Any]:
        """The settings that make it this method, by name."""
        flat = _flat(self.settings.model_dump(mode="json"))
        return {k: v for k, v in flat.items() if not any(k == s or k.startswith(f"{s}.") for s in _SAME)}


@dataclass(frozen=True)
class Method:
    """The folds and repeats of one experiment.

    Attributes:
        name: tells it from the others; empty where it is alone.
        site: whose patients count, or `all`.
    """

    name: str
    runs: tuple[One, ...]
    site: str = "all"

    @property
    def models(self) -> list[str]:
        """All models that were scored, in the order of the runs."""
        return list(
            dict.fromkeys(model for run in self.runs for model, site in run.last if site == self.site)
        )

    def series(self, model: str) -> Series | None:
        """The out-of-fold patients of each repeat; None where a run kept no rows of the model."""
        if any(model not in run.scored for run in self.runs):
            return None
        made = {}
        for repeat in sorted({run.repeat for run in self.runs}):
            parts = [run.scored[model] for run in self.runs if run.repeat == repeat]
            rows, site = (np.concatenate([getattr(p, n) for p in parts]) for n in ("rows", "site"))
            whole = Scored(parts[0].columns, rows, site)
            made[repeat] = whole if self.site == "all" else whole.only(site == self.site)
        return made

    def by_fold(self, model: str, metric: str) -> dict[tuple[Repeat, int], float]:
        """The metric over the patients of each run's fold, where it has one."""
        found = {}
        for run in self.runs:
            value = run.last.get((model, self.site), {}).get(metric)
            if value is not None:
                found[run.repeat, run.settings.data.fold] = float(value)
        return found


def gather(paths: Sequence[Path], site: str | None = None) -> list[Method]:
    """Group runs into methods, in the order given.

    Args:
        site: only this one's patients count.

    Raises:
        Stop: (`NO_RUN`) no such run; (`CONFIG`) runs over other data, the same fold twice, no such site.
    """
    runs = [One.open(path) for path in paths]
    sites = {at for run in runs for _, at in run.last} - {"all"}
    if site is not None and site not in sites:
        raise Stop(Exit.CONFIG, f"site is {site!r}; these runs have: {', '.join(sorted(sites))}")
    for run in runs[1:]:
        _check_data(runs[0], run)
    groups: list[list[One]] = []
    for run in runs:
        group = next((g for g in groups if g[0].kind == run.kind), None)
        if group is None:
            groups.append([run])
            continue
        for other in group:
            if (other.repeat, other.settings.data.fold) == (run.repeat, run.settings.data.fold):
                raise Stop(
                    Exit.CONFIG,
                    f"{run.path} and {other.path} are the same fold {run.settings.data.fold} of the same "
                    "seeds; leave one out, or change data.split_seed or seed",
                )
        group.append(run)
    return [Method(_name(g[0], [h[0] for h in groups]), tuple(g), site or "all") for g in groups]


def _check_data(one: One, other: One) -> None:
    ours, theirs = one.settings.data, other.settings.data
    pairs = [(f"data.{n}", getattr(ours, n), getattr(theirs, n)) for n in _DATA]
    pairs += [(f"data.columns.{n}", getattr(ours.columns, n), getattr(theirs.columns, n)) for n in _COLUMNS]
    pairs += [("split", one.split, other.split)]
    for name, mine, yours in pairs:
        if mine != yours:
            raise Stop(
                Exit.CONFIG,
                f"{one.path} and {other.path} do not belong together: {name} is {mine!r} and {yours!r}",
            )


def _name(run: One, others: Sequence[One]) -> str:
    """The settings by which it differs from the other methods; the experiment's name where that tells all."""
    if len(others) == 1:
        return ""
    names = [other.settings.run.experiment for other in others]
    if len(set(names)) == len(names):
        return run.settings.run.experiment
    differ = {k: v for k, v in run.kind.items() if any(other.kind.get(k) != v for other in others)}
    # another strategy has other parameters: its name says enough
    named = [k.removesuffix("name") for k in differ if k.endswith(".name")]
    short = [k for k in differ if k.endswith(".name") or not k.startswith(tuple(named))]
    told = (f"{k.removeprefix('plan.').removesuffix('.name')}={differ[k]}" for k in short[:3])
    return ", ".join(told) or run.path.name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            made |= _flat(value, f"{prefix}{name}.")
        else:
            made[prefix + name] = value
    return made
