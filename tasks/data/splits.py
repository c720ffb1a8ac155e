"""Which patient trains, validates, tests: by a keyed hash, so that adding a patient moves nobody."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from hashlib import blake2b, sha256

from conf.exits import Exit, Stop
from tasks.data.cache import Entry

Parts = dict[str, tuple[Entry, ...]]


def split(entries: Sequence[Entry], *, val_fraction: float, test_fraction: float, seed: int) -> Parts:
    """Deal patients to `train`, `val` and `test`.

    A split that the manifest suggests stays: `test` patients test, `val` patients validate, all others
    are training patients. Where nobody is marked test, those training patients test whose hash is below
    `test_fraction`; then likewise for `val` among the ones left.

    Small sets: dealt from two patients or more, such a part (its fraction above 0) gets at least the one
    with the lowest hash and leaves at least the one with the highest; from a single patient it gets none.
    Only where this steps in can adding a patient move another one.

    Raises:
        Stop: (`SPLIT_LEAK`) a patient stands in two splits; (`ONE_PATIENT`); (`NO_CASES`) none at all, or
            none to train on.
    """
    suggested = _suggested(entries)
    if not suggested:
        raise Stop(Exit.NO_CASES, "there is no case to split; ingest first")
    if len(suggested) == 1:
        raise Stop(Exit.ONE_PATIENT, "the data hold one patient; need at least 2 for training and test")
    parts: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for patient, name in suggested.items():
        parts[name or "train"].add(patient)
    if not parts["train"]:
        raise Stop(Exit.NO_CASES, "the split column leaves no patient to train on; mark some as train")
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        if fraction > 0 and not parts[name]:
            parts[name] = _below(parts["train"], fraction, seed, name)
            parts["train"] -= parts[name]
    return {name: of(entries, patients) for name, patients in parts.items()}


def deal(entries: Sequence[Entry], sites: int, seed: int) -> Parts:
    """Deal patients of data without a site column to `site_1`, `site_2`, …, numbers differing by at most one.

    Raises:
        Stop: (`TOO_MANY_SITES`) fewer patients than sites; (`CONFIG`) no site.
    """
    if sites < 1:
        raise Stop(Exit.CONFIG, f"data.sites is {sites}; need at least 1")
    patients = sorted({e.patient for e in entries}, key=lambda p: (keyed(seed, "site", p), p))
    if len(patients) < sites:
        raise Stop(
            Exit.TOO_MANY_SITES, f"data.sites is {sites} for {len(patients)} patients; use fewer sites"
        )
    width = len(str(sites))
    return {f"site_{i + 1:0{width}}": of(entries, patients[i::sites]) for i in range(sites)}


def by_site(entries: Iterable[Entry]) -> Parts:
    """Cases by the site they came from, names sorted; empty where no case has one.

    Test patients without a site are a test set that belongs to all: they are dealt out in the order of
    their hash, so each is scored once. Which site scores one then says nothing about that site.

    Raises:
        Stop: (`CONFIG`) only some have a site, and not all others are for testing.
    """
    groups: dict[str | None, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.site].append(entry)
    nowhere = groups.pop(None, [])
    strangers = {e.patient for e in nowhere} - {e.patient for own in groups.values() for e in own}
    if groups and all(e.split == "test" and e.patient in strangers for e in nowhere):
        sites = sorted(n for n in groups if n is not None)
        ordered = sorted(strangers, key=lambda p: (keyed(0, "site", p), p))
        turn = {patient: sites[i % len(sites)] for i, patient in enumerate(ordered)}
        for entry in nowhere:
            groups[turn[entry.patient]].append(entry)
    elif nowhere and groups:
        raise Stop(
            Exit.CONFIG,
            f"{len(nowhere)} cases have no site, the others have one of {len(groups)}; fill the site column "
            "or put each case below a site's folder",
        )
    return {name: tuple(groups[name]) for name in sorted(n for n in groups if n is not None)}


def _suggested(entries: Iterable[Entry]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for entry in entries:
        before = found.setdefault(entry.patient, entry.split)
        if before is None:
            found[entry.patient] = entry.split
        elif entry.split not in (None, before):
            raise Stop(
                Exit.SPLIT_LEAK,
                f"patient {entry.patient} stands in {before} and in {entry.split}; correct the split column",
            )
    return found


def _below(pool: Collection[str], fraction: float, seed: int, name: str) -> set[str]:
    """Patients whose hash is below `fraction`: at least one and at most all but one, of two or more."""
    ordered = sorted(pool, key=lambda p: (keyed(seed, name, p), p))
    count = sum(keyed(seed, name, p) < fraction for p in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def keyed(seed: int, purpose: str, patient: str) -> float:
    """A number in [0, 1) fixed by seed, purpose and patient alone."""
    key = sha256(f"{seed}/{purpose}".encode()).digest()
    digest = blake2b(patient.encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def of(entries: Iterable[Entry], patients: Collection[str]) -> tuple[Entry, ...]:
    """The cases of these patients."""
    chosen = set(patients)
    return tuple(e for e in entries if e.patient in chosen)
