"""Folds, partitions and blocks: laws over made-up patients, and the words of refusals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conf.exits import Exit, Stop
from conf.schema import Columns, Data
from tasks.data.cache import Entry
from tasks.data.dealing import federate, in_order, narrowed, patient_classes
from tasks.data.folds import fold_of
from tasks.data.splits import Parts

law = settings(deadline=None, max_examples=40)
names = st.sets(st.text("0123456789abcdef", min_size=1, max_size=6), min_size=6, max_size=60)
seeds = st.integers(0, 2**20)


def entry(patient: str, number: int = 0, site: str | None = None, split: str | None = None) -> Entry:
    key = f"{patient}-{number}"
    return Entry(key, patient, site, split, key, (1, 4, 4), {}, key)


def data(**given: object) -> Data:
    return Data.model_validate({"root": "none", "least": 1, **given})


def parity(e: Entry) -> dict[str, float]:
    return {"label": float(sum(map(ord, e.patient)) % 2)}


def nothing(e: Entry) -> dict[str, float]:
    return {}


def where(sites: dict[str, Parts]) -> dict[str, tuple[str, str]]:
    """Site and part of each case; a case that stands twice fails."""
    found: dict[str, tuple[str, str]] = {}
    for site, parts in sites.items():
        for part, entries in parts.items():
            for e in entries:
                assert e.key not in found
                found[e.key] = site, part
    return found


@law
@given(names, st.integers(2, 6), seeds)
def test_every_patient_tests_in_exactly_one_fold(patients: set[str], folds: int, seed: int) -> None:
    cases = [entry(p, i, site="ab"[len(p) % 2]) for p in sorted(patients) for i in (0, 1)]
    cases += [entry(f"crowd{i}", site="ab"[i % 2]) for i in range(20)]  # so that each site trains
    tested: Counter[str] = Counter()
    for fold in range(folds):
        found = where(federate(cases, data(folds=folds, fold=fold, split_seed=seed), parity))
        assert found.keys() == {e.key for e in cases}
        assert all(found[e.key][0] == e.site for e in cases)
        parts = {p: {found[e.key][1] for e in cases if e.patient == p} for p in {e.patient for e in cases}}
        assert all(len(own) == 1 for own in parts.values())
        assert {"train", "val", "test"} == set.union(*parts.values())
        tested.update(p for p, own in parts.items() if own == {"test"})
    assert tested == dict.fromkeys({e.patient for e in cases}, 1)


@law
@given(names, st.text("xyz", min_size=1, max_size=4), st.integers(2, 6), seeds)
def test_folds_are_balanced_and_a_new_patient_moves_few(
    patients: set[str], new: str, folds: int, seed: int
) -> None:
    strata = {p: "ab"[len(p) % 2] for p in patients}
    before = fold_of(strata, folds, seed)
    for stratum in "ab":
        sizes = Counter(before[p] for p in patients if strata[p] == stratum)
        assert max(sizes.values(), default=0) - min((sizes[k] for k in range(folds)), default=0) <= 1
    after = fold_of({**strata, new: "a"}, folds, seed)
    moved = [p for p in patients if before[p] != after[p]]
    assert len(moved) <= folds - 1
    assert all(strata[p] == "a" for p in moved)
    if sum(s == "a" for s in strata.values()) >= folds:
        assert all((before[p] - after[p]) % folds in (1, folds - 1) for p in moved)
    assert fold_of(dict(reversed(strata.items())), folds, seed) == before


def test_folds_are_stratified_by_class_and_repeats_differ() -> None:
    cases = [entry(f"p{i}") for i in range(100)]
    given = {"sites": 2, "folds": 5}
    for fold in range(5):
        sites = federate(cases, data(**given, fold=fold), parity)
        per_class = Counter((s, parity(e)["label"]) for s, parts in sites.items() for e in parts["test"])
        assert all(3 <= n <= 7 for n in per_class.values())  # 20 of 100, over two sites and classes
    one, two = (where(federate(cases, data(**given, split_seed=s), parity)) for s in (0, 1))
    assert one != two


def test_a_fold_has_validation_patients_of_its_own() -> None:
    cases = [entry(f"p{i}", site="a") for i in range(200)]
    val = [{e.key for e in federate(cases, data(folds=4, fold=k), nothing)["a"]["val"]} for k in range(4)]
    assert all(not val[0] >= other for other in val[1:])
    assert all(len(own) == 15 for own in val)


def test_folds_pass_over_the_manifests_split() -> None:
    cases = [entry(f"p{i}", site="a", split="test" if i < 9 else "train") for i in range(20)]
    tested = [federate(cases, data(folds=5, fold=k), nothing)["a"]["test"] for k in range(5)]
    assert [len(own) for own in tested] == [4] * 5


@law
@given(seeds, st.floats(0.3, 3), st.integers(2, 4), st.sampled_from([0, 3]))
def test_dirichlet_keeps_its_minimum(seed: int, concentration: float, sites: int, folds: int) -> None:
    cases = [entry(f"p{i}", n) for i in range(160) for n in range(1 + i % 2)]
    asked = data(
        partition="dirichlet", sites=sites, least=8, concentration=concentration, split_seed=seed, folds=folds
    )
    dealt = federate(cases, asked, parity)
    assert len(dealt) == sites
    assert where(dealt).keys() == {e.key for e in cases}
    for parts in dealt.values():
        assert len({e.patient for e in parts["train"]}) >= 8
        assert {parity(e)["label"] for e in parts["train"]} == {0.0, 1.0}
    site = {e.key: where(dealt)[e.key][0] for e in cases}
    assert all(site[f"p{i}-0"] == site[f"p{i}-1"] for i in range(1, 160, 2))
    assert federate(cases[::-1], asked, parity).keys() == dealt.keys()
    assert where(federate(cases[::-1], asked, parity)) == where(dealt)
    if folds:
        other = federate(cases, asked.model_copy(update={"fold": 2}), parity)
        assert {k: s for k, (s, _) in where(other).items()} == site  # folds share the deal


def test_dirichlet_is_unlike_where_the_concentration_is_small() -> None:
    cases = [entry(f"p{i}") for i in range(2000)]

    def spread(concentration: float) -> float:
        asked = data(partition="dirichlet", sites=3, concentration=concentration, test_fraction=0)
        shares = [
            sum(parity(e)["label"] for e in parts["train"]) / len(parts["train"])
            for parts in federate(cases, asked, parity).values()
        ]
        return max(shares) - min(shares)

    assert spread(0.3) > 0.2 > 0.08 > spread(1000)


def test_a_new_patient_moves_nobody_between_dirichlet_sites() -> None:
    cases = [entry(f"p{i}") for i in range(120)]
    asked = data(partition="dirichlet", sites=3)
    site = {k: s for k, (s, _) in where(federate(cases, asked, parity)).items()}
    more = {k: s for k, (s, _) in where(federate([*cases, entry("new")], asked, parity)).items()}
    assert {k: more[k] for k in site} == site


@pytest.mark.parametrize(
    ("given", "labels", "exit", "message"),
    [
        ({"least": 50}, parity, Exit.TOO_MANY_SITES, "gives each of data.sites=3 50 training"),
        ({"least": 15, "concentration": 0.01}, parity, Exit.TOO_MANY_SITES, "a higher data.concentration"),
        ({}, nothing, Exit.CONFIG, r"no case has one; set data\.columns\.label"),
        ({}, lambda e: {"label": 0.5}, Exit.CONFIG, "deals by class, and no case has one"),
    ],
)  # fmt: skip
def test_a_deal_that_cannot_be(given: dict[str, object], labels: object, exit: Exit, message: str) -> None:
    cases = [entry(f"p{i}") for i in range(60)]
    with pytest.raises(Stop, match=message) as caught:
        federate(cases, data(partition="dirichlet", sites=3, **given), labels)  # type: ignore[arg-type]
    assert caught.value.exit is exit


def test_a_patient_of_two_classes_counts_with_the_more_frequent_the_lower_of_equals() -> None:
    cases = [entry("a", 0), entry("a", 1), entry("a", 2), entry("b", 0), entry("b", 1), entry("c")]
    said = {"a-0": 2.0, "a-1": 0.0, "a-2": 2.0, "b-0": 3.0, "b-1": 1.0}
    found = patient_classes(cases, data(), lambda e: {"label": said[e.key]} if e.key in said else {})
    assert found == {"a": 2.0, "b": 1.0, "c": None}
    columns = Columns(labels=("grade", "other"))
    assert patient_classes(cases[-1:], data(columns=columns), lambda e: {"other": 1.0}) == {"c": 1.0}


def slices(count: int = 30, split: Sequence[str | None] = ()) -> list[Entry]:
    made = [replace(entry(f"{i:02}"), source=f"image/{i}.png") for i in range(count)]
    return [replace(e, split=s) for e, s in zip(made, split, strict=True)] if split else made


def numbers(entries: Sequence[Entry]) -> list[int]:
    return [int(e.key[:2]) for e in entries]


@pytest.mark.parametrize("fold", range(5))
def test_blocks_of_a_specimen_test_whole_and_the_rest_is_contiguous(fold: int) -> None:
    asked = data(partition="contiguous", sites=3, blocks=6, folds=5, fold=fold, val_fraction=0.25)
    sites = federate(slices()[::-1], asked, nothing)
    test = [i for parts in sites.values() for i in numbers(parts["test"])]
    assert test == list(range(6 * fold, 6 * fold + 6))
    assert len({e.patient for parts in sites.values() for e in parts["test"]}) == 1
    rest = [i for parts in sites.values() for i in numbers(parts["train"]) + numbers(parts["val"])]
    assert rest == [i for i in range(30) if i not in test]
    assert {(len(p["train"]), len(p["val"])) for p in sites.values()} == {(6, 2)}
    patients = [e.patient for parts in sites.values() for part in parts.values() for e in part]
    assert len(set(patients)) == 24 + 1  # no patient at two sites


def test_contiguous_sites_without_folds_take_the_manifests_parts() -> None:
    marks = ["train"] * 10 + ["val"] * 2 + ["test"] * 3
    sites = federate(slices(15, marks), data(partition="contiguous", sites=2), nothing)
    assert [numbers(p["train"]) + numbers(p["val"]) for p in sites.values()] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
    ]
    assert numbers(sites["site_2"]["val"]) == [10, 11]
    assert sorted(i for p in sites.values() for i in numbers(p["test"])) == [12, 13, 14]


def test_the_order_is_the_manifests(tmp_path: Path) -> None:
    assert numbers(in_order(slices(12)[::-1], data())) == list(range(12))  # 10.png after 9.png
    (tmp_path / "m.csv").write_text("image\n" + "".join(f"image/{i}.png\n" for i in (2, 0, 1)))
    asked = data(root=str(tmp_path), manifest="m.csv")
    assert numbers(in_order(slices(3), asked)) == [2, 0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folds": 9, "site": True}, "data.folds is 9 for 8 patients; use fewer folds"),
        ({"folds": 5, "blocks": 2}, "data.folds is 5 for 4 blocks of 2; use fewer"),
        ({"partition": "contiguous", "sites": 9, "test_fraction": 0}, "data.sites is 9 for 8 patients"),
        ({}, "no case names its site"),
    ],
)
def test_a_fold_or_stretch_that_cannot_be(given: dict[str, object], message: str) -> None:
    site = "a" if given.pop("site", given.get("blocks")) else None
    with pytest.raises(Stop, match=message):
        federate([replace(e, site=site) for e in slices(8)], data(**given), nothing)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"folds": 5, "fold": 5}, "data.fold is 5 of data.folds 5; need data.fold from 0 to 4"),
        ({"fold": 1}, "need data.folds of 2 or more"),
        ({"folds": 1}, "need data.folds of 2 or more"),
        ({"partition": "contiguous"}, "data.sites is 0; data.partition=contiguous needs"),
        ({"partition": "dirichlet"}, "data.sites is 0; data.partition=dirichlet needs"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        data(**given)


def test_some_sites_annotate_less_but_test_patients_keep_all() -> None:
    cases = [entry(f"{s}{i}", site=s, split=("train", "val", "test")[i % 3]) for s in "ab" for i in range(9)]
    sites = federate(cases, data(), nothing)
    made = narrowed(sites, {"a": (1,)})
    assert made["b"] == sites["b"]
    assert made["a"]["test"] == sites["a"]["test"]
    for part in ("train", "val"):
        assert [e.annotates for e in made["a"][part]] == [(1,)] * 3
        assert tuple(replace(e, annotates=None) for e in made["a"][part]) == sites["a"][part]
    with pytest.raises(Stop, match=r"data\.annotates has c; sites are a, b") as stop:
        narrowed(sites, {"c": (1,)})
    assert stop.value.exit is Exit.CONFIG
