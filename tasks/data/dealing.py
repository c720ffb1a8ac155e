"""From one pile of cases to a simulated federation: who is a patient, at which site, in which part.

In this order: images of a specimen become blocks, patients go to sites, a fold becomes the test part, the
rest is split. All of it follows from keyed hashes of patients or from the order of the manifest.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from conf.exits import Exit, Stop
from conf.schema import Data
from tasks.data.cache import Entry
from tasks.data.folds import fold_of
from tasks.data.splits import Parts, by_site, deal, keyed, of, split

LabelsOf = Callable[[Entry], Mapping[str, float]]
Classes = Mapping[str, float | None]

_DRAWS = 1000


def federate(entries: Sequence[Entry], data: Data, labels: LabelsOf) -> dict[str, Parts]:
    """Each site's cases by part (`train`, `val`, `test`).

    Args:
        labels: classes and values of a case, read only where they are needed.

    Raises:
        Stop: no data, one patient, a site without training patients, a patient in two splits, a deal that
            these patients do not allow.
    """
    if data.folds:
        entries = [replace(e, split=None) for e in entries]
    if data.blocks:
        entries = _blocks(in_order(entries, data), data.blocks)
    # for the whole federation first: a patient in two splits, or one patient only
    split(entries, val_fraction=data.val_fraction, test_fraction=data.test_fraction, seed=data.split_seed)
    if data.partition == "contiguous":
        return _contiguous(entries, data)
    needed = data.folds or data.partition == "dirichlet"
    classes = patient_classes(entries, data, labels) if needed else {}
    if data.partition == "dirichlet":
        return _Dirichlet(tuple(entries), data, classes).deal()
    dealt = deal(entries, data.sites, data.split_seed) if data.sites else by_site(entries)
    if not dealt:
        raise Stop(
            Exit.CONFIG,
            "no case names its site: set data.columns.site=COLUMN, use one folder a site below the root, "
            "or deal the patients out with data.sites=N",
        )
    return _split_all(dealt, data, classes, data.fold)


def narrowed(sites: Mapping[str, Parts], annotates: Mapping[str, tuple[int, ...]]) -> dict[str, Parts]:
    """The same, where some sites annotate some classes only; test patients keep what they have.

    Raises:
        Stop: (`CONFIG`) no such site.
    """
    if stray := sorted(annotates.keys() - sites.keys()):
        raise Stop(
            Exit.CONFIG, f"data.annotates has {', '.join(stray)}; sites are {', '.join(sorted(sites))}"
        )
    return {
        name: {
            part: tuple(
                e if part == "test" or name not in annotates else replace(e, annotates=annotates[name])
                for e in own
            )
            for part, own in parts.items()
        }
        for name, parts in sites.items()
    }


def patient_classes(entries: Sequence[Entry], data: Data, labels: LabelsOf) -> dict[str, float | None]:
    """Each patient's class: the most frequent one of its cases, of equally frequent ones the lowest.

    It is `label`, else the first of `data.columns.labels`; values that are not all whole numbers are no
    classes. None: nothing is known of the patient.
    """
    found = {e.key: labels(e) for e in entries}
    names = ("label", *data.columns.labels)
    name = next((n for n in names if any(n in own for own in found.values())), "label")
    votes: dict[str, Counter[float]] = {e.patient: Counter() for e in entries}
    for e in entries:
        if name in found[e.key]:
            votes[e.patient][found[e.key][name]] += 1
    if any(value != round(value) for own in votes.values() for value in own):
        return dict.fromkeys(votes)
    return {p: min(own, key=lambda c: (-own[c], c)) if own else None for p, own in votes.items()}


def in_order(entries: Sequence[Entry], data: Data) -> list[Entry]:
    """Cases as the manifest has them; without one by their paths, numbers in these as numbers."""
    rows: dict[str, int] = {}
    if data.manifest and data.columns.image:
        from tasks.data.tables import read_rows

        column = data.columns.image
        rows = {r[column]: i for i, r in enumerate(read_rows(Path(data.root).absolute() / data.manifest))}
    return sorted(entries, key=lambda e: (rows.get(e.source, len(rows)), _natural(e.source)))


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(n or 0), text) for n, text in re.findall(r"(\d*)(\D*)", path)]


def _blocks(ordered: Sequence[Entry], size: int) -> list[Entry]:
    """`size` images on end become one patient."""
    count = -(-len(ordered) // size)
    width = len(str(count))
    return [replace(e, patient=f"block-{i // size + 1:0{width}}") for i, e in enumerate(ordered)]


def _folded(site_of: Mapping[str, str], data: Data, classes: Classes) -> Mapping[str, int]:
    """The fold of each patient; blocks keep their order."""
    if data.blocks:
        blocks = sorted(site_of)
        if len(blocks) < data.folds:
            raise Stop(
                Exit.CONFIG,
                f"data.folds is {data.folds} for {len(blocks)} blocks of {data.blocks}; use fewer",
            )
        return {block: i * data.folds // len(blocks) for i, block in enumerate(blocks)}
    strata = {p: f"{site}/{classes.get(p)}" for p, site in site_of.items()}
    return fold_of(strata, data.folds, data.split_seed)


def _split_all(dealt: Parts, data: Data, classes: Classes, fold: int) -> dict[str, Parts]:
    """Split each site's cases. Where a fold or the manifest fixes who tests, no site chooses."""
    if data.folds:
        site_of = {e.patient: name for name in sorted(dealt, reverse=True) for e in dealt[name]}
        folds = _folded(site_of, data, classes)
        part = {p: "test" if folds[p] == fold else "train" for p in site_of}
        rest: dict[str, list[str]] = defaultdict(list)
        for p in sorted(site_of, key=lambda p: (keyed(data.split_seed, f"val/{fold}", p), p)):
            if part[p] == "train":
                rest[site_of[p]].append(p)
        for free in rest.values():
            part |= dict.fromkeys(free[: _held_out(len(free), data.val_fraction)], "val")
        dealt = {name: tuple(replace(e, split=part[e.patient]) for e in own) for name, own in dealt.items()}
    fixed = any(e.split == "test" for own in dealt.values() for e in own)
    return _trained({name: _parts(own, data, fixed) for name, own in sorted(dealt.items())})


def _held_out(count: int, fraction: float) -> int:
    """How many of `count` validate: at least one where any shall, and not all."""
    return max(0, min(max(round(fraction * count), int(fraction > 0)), count - 1))


def _trained(sites: dict[str, Parts]) -> dict[str, Parts]:
    if bare := [name for name, parts in sites.items() if not parts["train"]]:
        raise Stop(
            Exit.TOO_MANY_SITES,
            f"site {bare[0]} has no training patient, as have {len(bare) - 1} others of {len(sites)}; "
            "use fewer sites or move patients to train (settings: data.sites, data.columns.split)",
        )
    return sites


def _parts(entries: tuple[Entry, ...], data: Data, fixed: bool) -> Parts:
    marked = {kind: tuple(e for e in entries if e.split == kind) for kind in ("val", "test")}
    free = tuple(e for e in entries if e.split not in ("val", "test"))
    if len({e.patient for e in free}) < 2:
        return {"train": free, **marked}
    return split(
        entries,
        val_fraction=data.val_fraction,
        test_fraction=0.0 if fixed else data.test_fraction,
        seed=data.split_seed,
    )


@dataclass(frozen=True)
class _Dirichlet:
    """Sites with unlike shares of the classes: of each class, every site's share is drawn anew.

    A patient's site is where its hash falls among the shares of its class, so adding one moves nobody, as
    long as the same draw is the first that will do.
    """

    entries: tuple[Entry, ...]
    data: Data
    classes: Classes

    def deal(self) -> dict[str, Parts]:
        """The first draw with `data.least` training patients and every class at each site, in any fold.

        Raises:
            Stop: (`CONFIG`) there is no class; (`TOO_MANY_SITES`) no draw will do.
        """
        kinds = {c for c in self.classes.values() if c is not None}
        if not kinds:
            raise Stop(
                Exit.CONFIG,
                "data.partition=dirichlet deals by class, and no case has one; set data.columns.label=COLUMN",
            )
        possible = len(self.classes) >= self.data.sites * self.data.least
        for draw in range(_DRAWS if possible else 0):
            if (sites := self._tried(draw, kinds)) is not None:
                return sites
        raise Stop(
            Exit.TOO_MANY_SITES,
            f"no deal of {len(self.classes)} patients in {len(kinds)} classes gives each of data.sites="
            f"{self.data.sites} {self.data.least} training patients and every class; use fewer sites, a "
            "lower data.least or a higher data.concentration",
        )

    def _tried(self, draw: int, kinds: Collection[float]) -> dict[str, Parts] | None:
        """The sites of one draw, where they will do."""
        dealt = self._dealt(draw)
        if len(dealt) < self.data.sites or not all(self._enough(own, kinds) for own in dealt.values()):
            return None  # without the work of splitting
        tried = [_split_all(dealt, self.data, self.classes, k) for k in range(self.data.folds or 1)]
        trained = (parts["train"] for sites in tried for parts in sites.values())
        return tried[self.data.fold] if all(self._enough(own, kinds) for own in trained) else None

    def _enough(self, entries: Sequence[Entry], kinds: Collection[float]) -> bool:
        patients = {e.patient for e in entries}
        return len(patients) >= self.data.least and {self.classes[p] for p in patients} >= set(kinds)

    @cached_property
    def _places(self) -> dict[str, float]:
        """Where each patient falls, in every draw."""
        return {p: keyed(self.data.split_seed, "site", p) for p in self.classes}

    def _dealt(self, draw: int) -> Parts:
        import numpy as np

        random = np.random.default_rng([self.data.split_seed, draw])
        edges = {}
        for kind in sorted(set(self.classes.values()), key=lambda c: (c is None, c)):
            edges[kind] = np.cumsum(random.dirichlet([self.data.concentration] * self.data.sites))
        last = self.data.sites - 1
        site = {
            p: min(int(np.searchsorted(edges[c], self._places[p], "right")), last)
            for p, c in self.classes.items()
        }
        return _named(site, self.entries, self.data.sites)


def _named(site: Mapping[str, int], entries: Sequence[Entry], sites: int) -> Parts:
    """Cases by `site_1`, `site_2`, …, from the number of each patient's site."""
    by: dict[int, list[Entry]] = defaultdict(list)
    for e in entries:
        by[site[e.patient]].append(e)
    width = len(str(sites))
    return {f"site_{i + 1:0{width}}": tuple(own) for i, own in sorted(by.items())}


def _contiguous(entries: Sequence[Entry], data: Data) -> dict[str, Parts]:
    """Sites are stretches of the manifest's order, and each one's validation is the end of its stretch.

    Test patients belong to all: they are dealt in turn, so each is scored once. A border between sites may
    cut a block; its images count one by one then, outside the test part.
    """
    ordered = in_order(entries, data)
    if data.folds:
        folds = _folded({e.patient: "" for e in ordered}, data, {})
        ordered = [replace(e, split="test" if folds[e.patient] == data.fold else None) for e in ordered]
    test = split(ordered, val_fraction=0.0, test_fraction=data.test_fraction, seed=data.split_seed)["test"]
    held = {e.patient for e in test}
    rest = [
        replace(e, patient=f"{e.patient}-{e.key}") if data.blocks else e
        for e in ordered
        if e.patient not in held
    ]
    units = list(dict.fromkeys(e.patient for e in rest))
    if len(units) < data.sites:
        raise Stop(
            Exit.TOO_MANY_SITES, f"data.sites is {data.sites} for {len(units)} patients; use fewer sites"
        )
    sites: dict[str, Parts] = {}
    turns = list(dict.fromkeys(e.patient for e in test))
    for i in range(data.sites):
        own = units[i * len(units) // data.sites : (i + 1) * len(units) // data.sites]
        marked = [e.patient for e in rest if e.split == "val" and e.patient in set(own)]
        val = set(marked or own[len(own) - _held_out(len(own), data.val_fraction) :])
        sites[f"site_{i + 1:0{len(str(data.sites))}}"] = {
            "train": of(rest, set(own) - val),
            "val": of(rest, val),
            "test": of(test, turns[i :: data.sites]),
        }
    return _trained(sites)
