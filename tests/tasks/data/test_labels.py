import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from conf.exits import Exit, Stop
from tasks.data.labels import check_label_map, classes
from tasks.data.source import Faulty, LabelMap, Reason


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
    out = classes(values.astype(dtype), known)
    assert out.dtype == np.uint8
    assert out.tolist() == [[known[v] for v in row] for row in values.tolist()]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_every_kind_of_number_gives_the_same(dtype: type) -> None:
    values = np.array([[0, 7], [200, 7]])
    assert classes(values.astype(dtype), {0: 3, 7: 0, 200: 1, 9: 9}).tolist() == [[3, 0], [1, 0]]
    with pytest.raises(Faulty, match="mask has 7; accepted 0, 200"):
        classes(values.astype(dtype), {0: 0, 200: 1})


def test_without_a_map_values_are_classes() -> None:
    values = np.arange(256).reshape(16, 16)
    assert np.array_equal(classes(values, None), values)


def test_nonzero_takes_instance_numbers() -> None:
    assert classes(np.array([0, 1, -1, 70_000]), "nonzero").tolist() == [0, 1, 1, 1]


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
        classes(np.array(values), known)
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
