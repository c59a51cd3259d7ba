import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import tensors

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4)


def _named(shapes: list[list[int]]) -> tensors.Tensors:
    rng = torch.Generator().manual_seed(0)
    return {f"t{i}": torch.randn(s, generator=rng) for i, s in enumerate(shapes)}


@given(shapes)
def test_unflatten_undoes_flatten(shapes) -> None:
    named = _named(shapes)
    back = tensors.unflatten(tensors.flatten(named), named)
    assert back.keys() == named.keys()
    assert all(torch.equal(back[name], named[name]) for name in named)


def test_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected 2 values, got 3"):
        tensors.unflatten(torch.zeros(3), {"a": torch.zeros(2)})


def test_algebra_goes_name_by_name() -> None:
    one, two = {"a": torch.ones(2)}, {"a": torch.full((2,), 2.0)}
    assert tensors.add(one, two)["a"].tolist() == [3.0, 3.0]
    assert tensors.subtract(one, two)["a"].tolist() == [-1.0, -1.0]
    assert tensors.scale(two, 0.5)["a"].tolist() == [1.0, 1.0]
    assert tensors.zeros_like(two)["a"].tolist() == [0.0, 0.0]


def test_prefixes_come_and_go() -> None:
    named = {"a": torch.ones(1), "b.c": torch.ones(1)}
    prefixed = {**tensors.with_prefix("x", named), "y.a": torch.zeros(1)}
    assert tensors.without_prefix("x", prefixed).keys() == named.keys()


def test_a_fingerprint_sees_names_dtypes_shapes_and_values_not_order() -> None:
    a, b = torch.zeros(2), torch.ones(2)
    whole = tensors.fingerprint([("a", a), ("b", b)])
    assert whole == tensors.fingerprint([("b", b), ("a", a)])
    others = [
        [("a", a), ("c", b)],
        [("a", a.half()), ("b", b)],
        [("a", a.view(2, 1)), ("b", b)],
        [("a", a), ("b", b + 1e-7)],
    ]
    assert whole not in {tensors.fingerprint(other) for other in others}
