import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conf.exits import Exit, Stop
from conf.schema import Label, Labels
from tasks.data.labels import check_label_map, class_number, mapped
from tasks.data.naming import naming
from tasks.data.source import Faulty, LabelMap, Naming, Reason


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.integers(-300, 70_000), st.integers(0, 255), min_size=1, max_size=9).flatmap(
        lambda known: st.tuples(
            st.just(known), hnp.arrays(np.int64, (2, 3), elements=st.sampled_from(sorted(known)))
        )
    ),
    st.sampled_from([np.int32, np.float32, np.float64]),
)
def test_each_voxel_is_looked_up(drawn: tuple[dict[int, int], np.ndarray], dtype: type) -> None:
    known, values = drawn
    out = mapped(values.astype(dtype), known)[0]
    assert out.dtype == np.uint8
    assert out.tolist() == [[known[v] for v in row] for row in values.tolist()]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_kind_of_number_gives_the_same(dtype: type) -> None:
    values = np.array([[0, 7], [200, 7]])
    assert mapped(values.astype(dtype), {0: 3, 7: 0, 200: 1, 9: 9})[0].tolist() == [[3, 0], [1, 0]]
    with pytest.raises(Faulty, match="mask has 7; accepted 0, 200"):
        mapped(values.astype(dtype), {0: 0, 200: 1})


def test_without_a_map_values_are_classes() -> None:
    values = np.arange(256).reshape(16, 16)
    assert np.array_equal(mapped(values, None)[0], values)


def test_nonzero_takes_instance_numbers() -> None:
    assert mapped(np.array([0, 1, -1, 70_000]), "nonzero")[0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("values", "known", "message"),
    [
        ([0, 255, 7], {0: 0, 255: 1}, r"mask has 7; accepted 0, 255"),
        ([0, 256], None, "mask has 256; accepted 0 to 255"),
        ([0, -1], None, "mask has -1; accepted 0 to 255"),
        ([0.0, 0.5], {0: 0, 1: 1}, r"mask has 0\.5; accepted 0, 1"),
        ([0.0, np.nan], {0: 0}, "mask has nan; accepted 0"),
        (range(100, 120), {0: 0}, "mask has 100, 101, 102, 103, 104, 105, 106, 107, …; accepted 0"),
    ],
)
def test_a_value_outside_the_map_is_named(values: list[float], known: LabelMap, message: str) -> None:
    with pytest.raises(Faulty, match=message) as caught:
        mapped(np.array(values), known)
    assert caught.value.reason is Reason.LABEL


@pytest.mark.parametrize(
    ("label_map", "message"), [({0: 0, 1: 256}, r"classes \[256\]"), ({0: -1}, r"\[-1\]"), ({}, "is empty")]
)
def test_a_map_to_no_class_stops(label_map: LabelMap, message: str) -> None:
    with pytest.raises(Stop, match=message) as caught:
        check_label_map(label_map)
    assert caught.value.exit is Exit.CONFIG
    check_label_map({0: 0, 300: 255})
    check_label_map("nonzero")
    check_label_map(None)


FEDERATION = (
    Label(name="background", value=0),
    Label(name="liver", value=1, code=("SCT", "10200004", "Liver")),
    Label(name="tumour", value=2),
)


def test_a_site_s_own_lines_come_before_the_dictionary() -> None:
    names = naming(
        Labels(dictionary=FEDERATION, names={"Leber  LINKS": "liver", 7: "tumour", "tumour": "liver"})
    )
    assert names.known is not None
    wanted: dict[int | str, int | None] = {
        "leber links": 1,
        " Leber Links": 1,
        7: 2,
        "Tumour": 1,
        "SCT:10200004": 1,
        "sct:1": None,
        1: None,
        0: 0,
    }
    assert {n: names.find(n) for n in wanted} == wanted
    assert names.find("nobody", "Liver", 7) == 1  # the first that is known
    assert names.annotates is None


def test_a_site_that_annotates_one_class_maps_no_other() -> None:
    names = naming(Labels(dictionary=FEDERATION, names={5: "liver", 6: "tumour"}, annotates=("liver",)))
    assert (names.find(5), names.find(6), names.find("tumour"), names.annotates) == (1, None, None, (1,))


def test_without_dictionary_numbers_are_classes() -> None:
    assert [naming(Labels()).find(n) for n in (3, "liver", 256)] == [3, None, None]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dictionary": FEDERATION, "names": {"x": "kidney"}},
            "labels.names has kidney; labels.dictionary has",
        ),
        ({"names": {"x": "kidney"}}, "labels.dictionary has none"),
        ({"dictionary": FEDERATION, "annotates": ("kidney",)}, "labels.annotates has kidney"),
        ({"dictionary": (*FEDERATION, Label(name="liver", value=9))}, "the name liver twice"),
        ({"dictionary": (*FEDERATION, Label(name="spleen", value=2))}, "the value 2 twice"),
    ],
)
def test_a_dictionary_holds_together(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.model_validate(given)


def test_what_is_not_mapped_is_left_out_where_the_site_says_so() -> None:
    names = Naming({1: 4}, ignore=True)
    out, unmapped = mapped(np.array([[0, 1], [9, 2]], np.uint8), names)
    assert (out.tolist(), unmapped) == ([[0, 4], [0, 0]], ("2", "9"))
    assert class_number("odd", "c", names) is None


def test_numbers_stay_and_names_are_mapped() -> None:
    own: dict[int | str, int] = {"Benign": 0, "malignant": 1, 3: 7}
    names = Naming.of(own)
    assert [class_number(t, "c", names) for t in ("benign", " MALIGNANT", "3", "-1.5")] == [0, 1, 3, -1.5]
    with pytest.raises(Faulty, match="c is 'odd'; accepted 3, benign, malignant"):
        class_number("odd", "c", names)
    with pytest.raises(Faulty, match="need a finite number") as caught:
        class_number("inf", "c", names)
    assert caught.value.reason is Reason.CELL


def test_a_name_has_one_meaning() -> None:
    with pytest.raises(Stop, match="label 'LIVER' is mapped twice"):
        Naming({"liver": 1, "LIVER": 2})
    assert Naming({"liver": 1, "LIVER ": 1}).find("Liver") == 1
    with pytest.raises(Stop, match="label 'leber' is mapped twice"):
        naming(Labels(dictionary=FEDERATION, names={"Leber": "liver", "leber": "tumour"}))
