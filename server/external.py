"""A finished run's model on cases it has never met: external validation."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import ValidationError

from conf.exits import Exit, Stop
from conf.files import write_atomic
from conf.schema import Data, complaint
from server.evaluate import Line, line_of
from server.predict import model_of
from server.report.table import draw, results
from server.runfolder import RunFolder
from server.simulate import cached
from tasks.data.cache import Cache, Entry

#: what a run's data setting is for a set that names neither sites nor splits
_SPARE = {"sites": 0, "folds": 0, "blocks": 0, "partition": "sites"}


def evaluate(run: Path, overrides: list[str]) -> list[Line]:
    """Score the run's model on every case of another set, by site where it names sites.

    The lines go to `RUN/evaluations/`, never among those of the run's own patients.

    Args:
        overrides: `data.root=FOLDER` and whatever else differs from the run's own data settings.

    Raises:
        Stop: (`CONFIG`) a setting, cases that do not suit the plan, a run without one model; (`NO_CASES`)
            none could be scored.
    """
    folder = RunFolder.open(run)
    settings, (task, says) = folder.settings, model_of(folder)
    cache = cached(_data(settings.data, overrides))
    lines, total = [], task.statistics()
    for site, patients in _by_site(cache).items():
        own = task.statistics()
        for entries in patients:
            cases = [cache.load(entry) for entry in entries]
            try:
                own = own + task.score(cases, [says(case) for case in cases])
            except ValueError as error:
                raise Stop(Exit.CONFIG, f"the run does not suit the cases of {site}: {error}") from None
        lines.append(line_of(own, settings.plan.federation.rounds, "external", "federated", site))
        total = total + own
    if not total.patients:
        raise Stop(
            Exit.NO_CASES, "no case could be scored: masks or labels are missing (settings: data.columns)"
        )
    lines.append(line_of(total, settings.plan.federation.rounds, "external", "federated", "all"))
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    (run / "evaluations").mkdir(exist_ok=True)
    write_atomic(run / "evaluations" / f"{name}.jsonl", text.encode())
    return lines


def _data(own: Data, overrides: list[str]) -> Data:
    if not any(text.startswith("data.root=") for text in overrides):
        raise Stop(
            Exit.CONFIG, "data.root is missing; give the other set: wardround evaluate RUN data.root=FOLDER"
        )
    wrong = [text for text in overrides if not text.startswith("data.") or "=" not in text]
    if wrong:
        raise Stop(Exit.CONFIG, f"{wrong[0]!r} is no setting of the data; give data.NAME=VALUE")
    given = OmegaConf.merge(
        {"data": own.model_dump() | {"cache": None} | _SPARE}, OmegaConf.from_dotlist(overrides)
    )
    try:
        return Data.model_validate(OmegaConf.to_container(given)["data"])  # type: ignore[call-overload,index]
    except ValidationError as error:
        raise Stop(Exit.CONFIG, complaint(error, prefix="data.")) from None


def _by_site(cache: Cache) -> dict[str, list[list[Entry]]]:
    """Each site's patients, each with their cases; `external` where no site is named."""
    found: dict[str, dict[str, list[Entry]]] = {}
    for entry in sorted(cache.entries, key=lambda e: (e.patient, e.key)):
        found.setdefault(entry.site or "external", {}).setdefault(entry.patient, []).append(entry)
    return {site: list(found[site].values()) for site in sorted(found)}


def show(lines: list[Line]) -> None:
    """Print them."""
    draw(replace(results([line | {"split": "test"} for line in lines]), split="another set"))
