import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.exits import Exit, Stop
from tasks.data.cache import Entry
from tasks.data.splits import by_site, deal, split


def entry(patient: str, number: int = 0, part: str | None = None, site: str | None = None) -> Entry:
    key = f"{patient}-{number}"
    return Entry(key, patient, site, part, key, (1, 4, 4), {}, key)


patients = st.sets(st.text("0123456789abcdef", min_size=1, max_size=8), min_size=2, max_size=60)
fractions = st.floats(0.0, 0.5)
law = settings(deadline=None, max_examples=60)


@law
@given(patients, fractions, fractions, st.integers(0, 2**64))
def test_every_case_is_in_exactly_one_part_with_its_patient(
    names: set[str], val: float, test: float, seed: int
) -> None:
    cases = [entry(p, i) for p in names for i in range(1 + len(p) % 3)]
    parts = split(cases, val_fraction=val, test_fraction=test, seed=seed)
    assert sorted(e.key for p in parts.values() for e in p) == sorted(e.key for e in cases)
    owners = [{e.patient for e in p} for p in parts.values()]
    assert sum(len(o) for o in owners) == len(names)
    assert parts["train"]
    assert bool(parts["test"]) == (test > 0)


@law
@given(patients, st.text("xyz", min_size=1, max_size=5), fractions, fractions, st.integers(0, 2**20))
def test_adding_a_patient_moves_nobody(names: set[str], new: str, val: float, test: float, seed: int) -> None:
    # forty more, so that no part is so small that its one guaranteed patient matters
    crowd = [entry(p) for p in sorted(names | {f"crowd{i}" for i in range(40)})]
    val, test = 0.2 + val / 4, 0.2 + test / 4

    def where(cases: list[Entry]) -> dict[str, str]:
        parts = split(cases, val_fraction=val, test_fraction=test, seed=seed)
        return {e.patient: name for name, p in parts.items() for e in p}

    before, after = where(crowd), where([*crowd, entry(new)])
    assert {p: after[p] for p in before} == before


def test_shares_are_those_asked_for() -> None:
    cases = [entry(f"{i:05}") for i in range(20_000)]
    parts = split(cases, val_fraction=0.1, test_fraction=0.2, seed=3)
    # binomial: five standard deviations
    assert len(parts["test"]) == pytest.approx(4000, abs=5 * (20_000 * 0.2 * 0.8) ** 0.5)
    assert len(parts["val"]) == pytest.approx(1600, abs=5 * (16_000 * 0.1 * 0.9) ** 0.5)
    other = split(cases, val_fraction=0.1, test_fraction=0.2, seed=4)
    assert other["test"] != parts["test"]


def test_a_suggested_split_stays() -> None:
    cases = [entry(f"t{i}", part="test") for i in range(5)] + [
        entry(f"r{i}", part="train") for i in range(50)
    ]
    parts = split(cases, val_fraction=0.3, test_fraction=0.9, seed=0)
    assert {e.patient for e in parts["test"]} == {f"t{i}" for i in range(5)}
    assert 0 < len(parts["val"]) < 30
    assert all(e.split == "train" for e in parts["val"])


def test_a_suggested_validation_set_stays() -> None:
    cases = (
        [entry("v", part="val")]
        + [entry(f"r{i}", part="train") for i in range(9)]
        + [entry("t", part="test")]
    )
    parts = split(cases, val_fraction=0.5, test_fraction=0.5, seed=0)
    assert [e.patient for e in parts["val"]] == ["v"]
    assert len(parts["train"]) == 9


@pytest.mark.parametrize("seed", range(20))
def test_two_patients_train_and_test(seed: int) -> None:
    parts = split([entry("a"), entry("b")], val_fraction=0.4, test_fraction=0.1 + 0.04 * seed, seed=seed)
    assert {k: len(v) for k, v in parts.items()} == {"train": 1, "val": 0, "test": 1}


def test_a_patient_in_two_splits_is_named() -> None:
    with pytest.raises(Stop, match=r"patient 8f3e stands in train and in test") as caught:
        split([entry("8f3e", 0, "train"), entry("aa"), entry("8f3e", 1, "test")],
              val_fraction=0.1, test_fraction=0.2, seed=0)  # fmt: skip
    assert caught.value.exit is Exit.SPLIT_LEAK


@pytest.mark.parametrize(
    ("cases", "exit", "message"),
    [
        ([], Exit.NO_CASES, "no case to split"),
        ([entry("a", 0), entry("a", 1)], Exit.ONE_PATIENT, "hold one patient"),
        ([entry("a", part="test"), entry("b", part="val")], Exit.NO_CASES, "no patient to train on"),
    ],
)
def test_what_cannot_be_split(cases: list[Entry], exit: Exit, message: str) -> None:
    with pytest.raises(Stop, match=message) as caught:
        split(cases, val_fraction=0.1, test_fraction=0.2, seed=0)
    assert caught.value.exit is exit


@law
@given(patients, st.integers(1, 12), st.integers(0, 2**40))
def test_dealt_sites_are_balanced_and_whole(names: set[str], sites: int, seed: int) -> None:
    cases = [entry(p, i) for p in sorted(names) for i in (0, 1)]
    if sites > len(names):
        with pytest.raises(Stop, match=rf"data.sites is {sites} for {len(names)} patients") as caught:
            deal(cases, sites, seed)
        assert caught.value.exit is Exit.TOO_MANY_SITES
        return
    dealt = deal(cases, sites, seed)
    owners = [{e.patient for e in own} for own in dealt.values()]
    assert len(dealt) == sites
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    assert sum(map(len, owners)) == len(names)
    assert sum(map(len, dealt.values())) == len(cases)
    assert dealt == deal(list(reversed(cases))[::-1], sites, seed)


def test_sites_come_from_the_entries() -> None:
    cases = [entry("a", site="north"), entry("b", site="east"), entry("c", site="north")]
    assert {s: [e.patient for e in own] for s, own in by_site(cases).items()} == {
        "east": ["b"],
        "north": ["a", "c"],
    }
    assert by_site([entry("a")]) == {}
    shared = [entry(f"t{i}", part="test") for i in range(5)]
    dealt = by_site([*cases, *shared])
    assert sorted(e.key for own in dealt.values() for e in own) == sorted(e.key for e in [*cases, *shared])
    assert {s: sum(e.split == "test" for e in own) for s, own in dealt.items()} == {"east": 3, "north": 2}
    with pytest.raises(Stop, match="1 cases have no site"):  # it would be trained on at north
        by_site([*cases, entry("a", 1, part="test")])
    with pytest.raises(Stop, match="1 cases have no site"):
        by_site([*cases, entry("d")])
