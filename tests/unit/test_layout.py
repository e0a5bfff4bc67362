from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dugnad.optim.layout import Layout, LayoutError

TENSORS = [("head.weight", (3, 50)), ("bias", (7,)), ("scalar", ()), ("embed", (64, 4))]

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
tensor_lists = st.dictionaries(st.text("abcxyz.", min_size=1, max_size=6), shapes, min_size=1, max_size=8).map(
    lambda named: list(named.items())
)


def some_values(layout: Layout) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in layout.tensors}


def test_the_order_in_which_tensors_are_listed_does_not_matter() -> None:
    one, other = Layout(TENSORS, 64, 128), Layout(TENSORS[::-1], 64, 128)
    assert one == other
    assert one.digest() == other.digest()
    assert [slot.name for slot in one.slots] == ["bias", "embed", "head.weight", "scalar"]


def test_lists_are_as_good_as_tuples_for_shapes() -> None:
    assert Layout([("a", [2, 3])], 64, 64).digest() == Layout([("a", (2, 3))], 64, 64).digest()


@pytest.mark.parametrize(
    "other",
    [
        Layout([*TENSORS, ("more", (1,))], 64, 128),
        Layout([("bias", (8,)), *[t for t in TENSORS if t[0] != "bias"]], 64, 128),
        Layout(TENSORS, 128, 128),
        Layout(TENSORS, 64, 256),
    ],
)
def test_any_difference_changes_the_digest(other: Layout) -> None:
    assert other.digest() != Layout(TENSORS, 64, 128).digest()


def test_the_digest_stays_the_same_from_version_to_version() -> None:
    digest = Layout([("b", (2, 3)), ("a", ())], 64, 128).digest().hex()
    assert digest == "1c8a21e5e02a28efd814f1b251cfcdb2e7b5a3c80726fea03b17df44fae9ace3"


@given(tensor_lists, st.sampled_from([64, 128]), st.integers(1, 5))
def test_no_block_straddles_two_tensors_and_parts_tile_the_vector(
    tensors: list[tuple[str, tuple[int, ...]]], block: int, blocks_per_part: int
) -> None:
    layout = Layout(tensors, block, block * blocks_per_part)
    end = 0
    for slot in layout.slots:
        assert slot.start == end
        assert slot.start % block == 0
        assert slot.stop - slot.start == np.prod(slot.shape, dtype=int)
        assert 0 <= slot.end - slot.stop < block
        end = slot.end
    assert end == layout.total_elements
    assert [i for part in layout.parts for i in part] == list(range(layout.total_elements))
    assert all(part.start % block == 0 and len(part) % block == 0 for part in layout.parts)
    assert all(len(part) == layout.part_elements for part in layout.parts[:-1])


@given(tensor_lists)
def test_what_is_flattened_unflattens_to_the_same_and_the_padding_is_zero(
    tensors: list[tuple[str, tuple[int, ...]]],
) -> None:
    layout = Layout(tensors, 64, 128)
    values = some_values(layout)
    vector = layout.flatten(values)
    back = layout.unflatten(vector)
    assert list(back) == sorted(values)
    assert all(np.array_equal(back[name], values[name]) for name in values)
    assert sum(np.count_nonzero(vector[slot.stop : slot.end]) for slot in layout.slots) == 0
    assert layout.num_elements == sum(value.size for value in values.values())


def test_unflattened_tensors_are_views_of_the_vector() -> None:
    layout = Layout(TENSORS, 64, 128)
    vector = np.zeros(layout.total_elements, np.float32)
    layout.unflatten(vector)["bias"][:] = 5
    assert vector.sum() == 35


def test_a_transposed_tensor_is_flattened_by_its_values() -> None:
    layout = Layout([("a", (2, 3))], 64, 64)
    column_major = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert layout.flatten({"a": column_major})[:6].tolist() == [0, 1, 2, 3, 4, 5]


def test_clearing_the_padding_leaves_the_values() -> None:
    layout = Layout(TENSORS, 64, 128)
    vector = np.ones(layout.total_elements, np.float32)
    layout.clear_padding(vector)
    assert vector.sum() == layout.num_elements
    assert all((tensor == 1).all() for tensor in layout.unflatten(vector).values())


@pytest.mark.parametrize(
    ("tensors", "block", "part", "said"),
    [
        ([], 64, 64, "at least one tensor"),
        ([("a", (1,)), ("a", (2,))], 64, 64, "'a' is listed twice"),
        ([("a", (2, 0))], 64, 64, "'a' has shape"),
        ([("a", (-1,))], 64, 64, "'a' has shape"),
        ([("a", (1,) * 17)], 64, 64, "at most 16 axes"),
        ([("", (1,))], 64, 64, "cannot be the name"),
        ([("__metadata__", (1,))], 64, 64, "cannot be the name"),
        ([("a", (1,))], 65, 65, "block_elements is 65"),
        ([("a", (1,))], 0, 64, "block_elements is 0"),
        ([("a", (1,))], 64, 96, "part_elements is 96"),
        ([("a", (1,))], 64, 0, "part_elements is 0"),
    ],
)
def test_impossible_layouts_are_refused(
    tensors: list[tuple[str, tuple[int, ...]]], block: int, part: int, said: str
) -> None:
    with pytest.raises(LayoutError, match=said):
        Layout(tensors, block, part)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    layout = Layout(TENSORS, 64, 128)
    values = some_values(layout)
    with pytest.raises(LayoutError, match=r"missing \['bias'\]"):
        layout.flatten({name: value for name, value in values.items() if name != "bias"})
    with pytest.raises(LayoutError, match=r"not in it \['buffer'\]"):
        layout.flatten(values | {"buffer": values["bias"]})
    with pytest.raises(LayoutError, match="'bias' is float64"):
        layout.flatten(values | {"bias": np.zeros(7)})
    with pytest.raises(LayoutError, match=r"'bias' is float32 \(7, 1\)"):
        layout.flatten(values | {"bias": np.zeros((7, 1), np.float32)})


def test_vectors_that_do_not_fit_are_refused() -> None:
    layout = Layout(TENSORS, 64, 128)
    wrong: list[NDArray[Any]] = [
        np.zeros(layout.total_elements - 1, np.float32),
        np.zeros(layout.total_elements, np.float64),
        np.zeros(2 * layout.total_elements, np.float32)[::2],
    ]
    for vector in wrong:
        with pytest.raises(LayoutError, match="vector is"):
            layout.unflatten(vector)
        with pytest.raises(LayoutError, match="vector is"):
            layout.clear_padding(vector)
