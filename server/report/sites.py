"""What a fingerprint run says about sites, as tables: on the screen, as text and as a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from conf.files import write_atomic
from server.fingerprint import Found
from server.heterogeneity import Comparison
from server.planning import Decision

_FAR = 1.0  # octaves between two sites' intensities: more than one scanner model to the next


def show(found: Found, path: Path) -> None:
    """Print what was found in the run at `path`."""
    console = Console(highlight=False, markup=False)
    _print(found, console)
    console.print(f"run: {path}; plan: {path / 'experiment' / 'auto.yaml'}", soft_wrap=True)


def save(found: Found, path: Path) -> None:
    """Write `sites.txt` and `sites.html` into the run's directory."""
    record = Console(file=io.StringIO(), record=True, width=160, highlight=False, markup=False)
    _print(found, record)
    write_atomic(path / "sites.txt", record.export_text(clear=False).encode())
    write_atomic(path / "sites.html", record.export_html(inline_styles=True).encode())


def _print(found: Found, console: Console) -> None:
    """Sentences wrap; numbers are never cut."""
    made = parts(found)
    numbers = [part for part in made if isinstance(part, Table) and part.columns[0].no_wrap]
    wide = Console(width=10_000)
    console.width = max(console.width, *(wide.measure(table).maximum for table in numbers), 0)
    for part in made:
        console.print(part)


def parts(found: Found) -> list[Table | str]:
    """The tables and sentences of the report."""
    made: list[Table | str] = []
    if found.sites:
        made += [_medians(found.compared), *_distances(found.compared), *_findings(found)]
    made.append(_rules(found.decisions))
    return made


def _table(title: str, columns: Sequence[str], *, numbers: bool = False) -> Table:
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=numbers)
    return table


def _medians(compared: Comparison) -> Table:
    classes = sorted({n for one in compared.sites.values() for n in one if n.startswith("volume_")})
    header = [f"class {int(n.rpartition('_')[2]) + 1}, ml" for n in classes]
    table = _table(
        "Medians of the training patients",
        ["site", "patients", "spacing, mm", "sides, voxels", "intensity", "spread", *header],
        numbers=True,
    )
    for site, one in compared.sites.items():
        joined = (
            " x ".join(f"{one[k]:.3g}" for a in range(3) if (k := f"{n}_{a}") in one)
            for n in ("spacing", "shape")
        )
        numbers = (f"{one[n]:.3g}" if n in one else "" for n in ("level", "spread", *classes))
        table.add_row(site, f"{one['patients']:.0f}", *joined, *numbers)
    return table


def _distances(compared: Comparison) -> list[Table | str]:
    if not compared.distances:
        return []
    names = list(dict.fromkeys(n for one in compared.distances.values() for n in one))
    table = _table(
        "Distances (Wasserstein-1, octaves; position in sides of the image; js: Jensen-Shannon, 0 to 1)",
        ["pair", *(n.replace("_", " ") for n in names)],
        numbers=True,
    )
    for pair, one in compared.distances.items():
        table.add_row(pair, *(f"{one[n]:.2f}" if n in one else "" for n in names))
    return [table]


def _findings(found: Found) -> list[Table | str]:
    compared = found.compared
    table = _table("What looks wrong", ["site", "kind", "what", "advice"])
    for one in compared.findings:
        table.add_row(one.site, one.kind, one.what, one.advice)
    clean = sorted(compared.sites.keys() - {one.site for one in compared.findings})
    made: list[Table | str] = [table] if compared.findings else []
    if clean:
        made.append(f"Nothing looks wrong at {', '.join(clean)}.")
    far = [one.get("foreground", one.get("intensity", 0.0)) for one in compared.distances.values()]
    if max(far, default=0.0) > _FAR and not any(one.kind == "intensity" for one in compared.findings):
        fixed = any(one.setting == "task.normalise" and one.value == "fixed" for one in found.decisions)
        advice = (
            "contrast phases, kernels or fields of view; train with more contrast (task.contrast=0.2)."
            if fixed
            else "scale each image by itself (task.normalise=zscore), or keep norms home (strategy=fedbn)."
        )
        made.append(f"Intensities differ by up to {max(far):.1f} octaves between sites: {advice}")
    return made


def _rules(decisions: Sequence[Decision]) -> Table:
    table = _table("The plan", ["setting", "value", "why"])
    for one in decisions:
        table.add_row(one.setting, str(one.value), one.reason)
    return table
