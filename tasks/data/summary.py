"""What an ingest found, for the site's engineer: counted from what is known of each case.

It names files and pseudonyms, so it stays at the site.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.exits import printable
from tasks.data.cache import Entry, Record
from tasks.data.source import Array, Raw

IDS = 20  # local ids listed for one reason; the counts cover all
_SAMPLE = 200_000  # values of an image from which percentiles are taken
_PLANES = 2, 3  # spatial axes a case can have


def facts(raw: Raw) -> dict[str, Any]:
    """What the report needs of a case, in a few numbers; taken while its arrays are in memory.

    Returns:
        `pixels`: digest of the image alone, equal under different headers. `intensity`: minimum, 1st, 50th
        and 99th percentile (of a sample), maximum. `spacing` in mm, `units`. `classes`: voxels by class.
        `look`: per spatial axis the index that shows most of the mask, or the middle. `labels`: classes.
    """
    out: dict[str, Any] = {"units": raw.units, "spacing": list(raw.spacing), "labels": dict(raw.labels)}
    if raw.image is not None and raw.image.size:
        head = f"{raw.image.dtype} {raw.image.shape} "
        digest = hashlib.sha256(head.encode())
        digest.update(np.ascontiguousarray(raw.image).reshape(-1).view(np.uint8).data)
        out["pixels"] = digest.hexdigest()[:16]
        out["intensity"] = _intensity(raw.image)
        out["look"] = [n // 2 for n in raw.image.shape[1:]]
    if raw.mask is not None and raw.mask.size:
        classes, look = _mask(raw.mask)
        out["classes"] = classes
        out["look"] = look or out.get("look", [])
    return out


def _mask(mask: Array) -> tuple[dict[str, int], list[int]]:
    """Voxels by class, and per axis the index with most of the foreground; none where there is none.

    A plane at a time: whole, the intermediate arrays would be larger than the mask.
    """
    counts = np.zeros(256, dtype=np.int64)
    along = [np.zeros(n, dtype=np.int64) for n in mask.shape]
    for i, plane in enumerate(mask):
        counts += np.bincount(plane.ravel(), minlength=256)
        inside = plane > 0
        along[0][i] = inside.sum()
        for axis in range(plane.ndim):
            along[axis + 1] += inside.sum(axis=tuple(a for a in range(plane.ndim) if a != axis))
    classes = {str(c): int(counts[c]) for c in np.flatnonzero(counts)}
    return classes, [int(np.argmax(n)) for n in along] if counts[1:].any() else []


def _intensity(image: Array) -> list[float]:
    flat = image.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)]
    low, middle, high = np.percentile(sample, [1, 50, 99])
    return [float(v) for v in (flat.min(), low, middle, high, flat.max())]


@dataclass(frozen=True)
class Group:
    """Cases that share something worth a look. `what` says what, `ids` are local."""

    what: str
    count: int
    ids: Sequence[str]


@dataclass(frozen=True)
class Summary:
    """An ingest in numbers.

    Attributes:
        out: refused cases by reason, most frequent first. shapes, spacings: per axis (minimum, median,
            maximum) by number of axes. intensities: by unit, the five numbers of `facts`, each as the
            median over cases. classes: by class, (cases, share of all voxels). labels: by name, cases by
            value. same: images that occur more than once. several: patients in several groups.
            odd: cases that may be wrong.
    """

    cases: int
    kept: int
    read: int
    patients: int
    out: Sequence[Group]
    shapes: Mapping[str, Sequence[Sequence[float]]]
    spacings: Mapping[str, Sequence[Sequence[float]]]
    intensities: Mapping[str, Sequence[float]]
    classes: Mapping[str, tuple[int, float]]
    labels: Mapping[str, Mapping[str, int]]
    same: Sequence[Group]
    several: Sequence[Group]
    odd: Sequence[Group]
    unmapped: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)


def summarise(records: Mapping[str, Record], read: int) -> Summary:
    """Count.

    Args:
        records: by local id. read: how many were read now.
    """
    kept = {s: (r.entry, r.facts) for s, r in sorted(records.items()) if r.entry is not None}
    unmapped = Counter(name for r in records.values() for name in r.unmapped)
    notes = Counter(note for r in records.values() for note in r.notes)
    refused: dict[str, list[str]] = defaultdict(list)
    for source, record in sorted(records.items()):
        if record.entry is None:
            refused[record.reason].append(source)
    return Summary(
        cases=len(records),
        kept=len(kept),
        read=read,
        patients=len({e.patient for e, _ in kept.values()}),
        out=_groups(refused),
        shapes=_ranges((e.shape[1:] for e, _ in kept.values()), _PLANES),
        spacings=_ranges((f.get("spacing", ()) for e, f in kept.values() if e.shape), _PLANES),
        intensities=_intensities(f for _, f in kept.values()),
        classes=_classes([f["classes"] for _, f in kept.values() if "classes" in f]),
        labels=_labels(f.get("labels", {}) for _, f in kept.values()),
        same=_same(records),
        several=_several(e for e, _ in kept.values()),
        odd=_odd(kept),
        unmapped=dict(unmapped.most_common()),
        notes=dict(notes.most_common()),
    )


def _groups(found: Mapping[str, Sequence[str]]) -> list[Group]:
    order = sorted(found, key=lambda what: (-len(found[what]), what))
    return [Group(str(what), len(found[what]), found[what][:IDS]) for what in order]


def _ranges(rows: Iterable[Sequence[float]], axes: Sequence[int]) -> dict[str, list[list[float]]]:
    """Per axis minimum, median, maximum, by number of axes."""
    by: dict[int, list[Sequence[float]]] = defaultdict(list)
    for row in rows:
        by[len(row)].append(row)
    found = {n: np.array(by[n], dtype=float) for n in axes if n in by}
    return {f"{n}D": np.stack([a.min(0), np.median(a, 0), a.max(0)], 1).tolist() for n, a in found.items()}


def _intensities(all_facts: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    by: dict[str, list[list[float]]] = defaultdict(list)
    for known in all_facts:
        if "intensity" in known:
            by[known["units"] or "as stored"].append(known["intensity"])
    return {units: np.median(np.array(rows), axis=0).tolist() for units, rows in sorted(by.items())}


def _classes(counted: Sequence[Mapping[str, int]]) -> dict[str, tuple[int, float]]:
    voxels: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    for classes in counted:
        voxels.update(classes)
        cases.update(classes.keys())
    total = sum(voxels.values())
    return {c: (cases[c], voxels[c] / total) for c in sorted(voxels, key=int)}


def _labels(rows: Iterable[Mapping[str, float]]) -> dict[str, dict[str, int]]:
    by: dict[str, Counter[float]] = defaultdict(Counter)
    for row in rows:
        for name, value in row.items():
            by[name][value] += 1
    return {name: _listed(sorted(counts.items())) for name, counts in sorted(by.items())}


def _listed(counts: Sequence[tuple[float, int]]) -> dict[str, int]:
    """The first values, and how many cases have another."""
    out: Counter[str] = Counter()
    for value, cases in counts[:IDS]:
        out[f"{value:g}"] += cases  # two may look the same
    if more := sum(cases for _, cases in counts[IDS:]):
        out["others"] = more
    return dict(out)


def _same(records: Mapping[str, Record]) -> list[Group]:
    """Images that are equal pixel by pixel, whatever their headers say."""
    by: dict[str, list[str]] = defaultdict(list)
    patients: dict[str, set[str]] = defaultdict(set)
    for source, record in sorted(records.items()):
        if pixels := record.facts.get("pixels"):
            by[pixels].append(source)
            patients[pixels].add(record.patient)
    twice = [p for p in by if len(by[p]) > 1]
    twice.sort(key=lambda p: (-len(patients[p]), by[p]))  # of several patients first: the serious ones
    return [Group(_of(len(patients[p])), len(by[p]), by[p][:IDS]) for p in twice]


def _of(patients: int) -> str:
    return "of one patient" if patients == 1 else f"of {patients} patients"


def _several(entries: Iterable[Entry]) -> list[Group]:
    """Patients whose cases stand in several splits, at several sites, or with several sexes."""
    columns: Mapping[str, Callable[[Entry], str | None]] = {
        "splits": lambda e: e.split,
        "sites": lambda e: e.site,
        "sexes": lambda e: e.groups.get("sex"),
    }
    seen: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in columns}
    for entry in entries:
        for name, value in columns.items():
            if found := value(entry):
                seen[name][entry.patient].add(found)
    found_in = {
        name: [f"{p} ({', '.join(sorted(v))})" for p, v in sorted(by.items()) if len(v) > 1]
        for name, by in seen.items()
    }
    return [Group(f"in several {name}", len(ids), ids[:IDS]) for name, ids in found_in.items() if ids]


def _odd(kept: Mapping[str, tuple[Entry, Mapping[str, Any]]]) -> list[Group]:
    found: dict[str, list[str]] = defaultdict(list)
    for source, (_, known) in kept.items():
        low, _, _, _, high = known.get("intensity") or (0, 0, 0, 0, 1)
        if low == high:
            found["image of one value"].append(source)
        if set(known.get("classes", ())) == {"0"}:
            found["empty mask"].append(source)
    return _groups(found)


def as_text(summary: Summary) -> str:
    """The report for a terminal or a file, a line a finding."""
    lines = [
        f"cases in      {summary.cases}",
        f"cases kept    {summary.kept} of {summary.patients} patients ({summary.read} read now)",
        f"cases out     {summary.cases - summary.kept}",
    ]
    lines += [f"  {g.count:>6}  {g.what}: {_ids(g)}" for g in summary.out]
    for title, ranges, unit in (("size", summary.shapes, "voxels"), ("spacing", summary.spacings, "mm")):
        for axes, rows in ranges.items():
            text = ", ".join(f"{low:.4g} to {high:.4g} (median {mid:.4g})" for low, mid, high in rows)
            lines.append(f"{title} {axes:<8} {text} {unit}")
    for units, (low, p1, mid, p99, high) in summary.intensities.items():
        text = f"median {mid:.4g}, 1 % {p1:.4g}, 99 % {p99:.4g}, from {low:.4g} to {high:.4g}"
        lines.append(f"intensity     {text} ({units}; medians over cases)")
    lines += [f"class {c:<7} in {n} cases, {s:.3%} of voxels" for c, (n, s) in summary.classes.items()]
    for name, counts in summary.labels.items():
        lines.append(f"label {name:<7} {', '.join(f'{v}: {n}' for v, n in counts.items())}")
    for title, groups in (("same image", summary.same), ("patients", summary.several), ("odd", summary.odd)):
        lines += [f"{title:<13} {g.count} {g.what}: {_ids(g)}" for g in groups]
    for title, counts in (("not mapped", summary.unmapped), ("note", summary.notes)):
        lines += [f"{title:<13} {name} ({n} cases)" for name, n in counts.items()]
    return "".join(f"{printable(line)}\n" for line in lines)


def _ids(group: Group) -> str:
    more = group.count - len(group.ids)
    return ", ".join(group.ids) + (f", … and {more} more" if more else "")
