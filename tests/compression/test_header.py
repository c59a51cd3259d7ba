"""Header fields and groups."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.compression.groups import group_tensors, in_group_order
from fedpeft.compression.header import HeaderReader, template_check, varint
from fedpeft.errors import InvalidPayload


@given(st.integers(0, 2**40))
def test_varints_come_back_in_the_fewest_bytes(number: int) -> None:
    written = varint(number)
    reader = HeaderReader(written)
    assert reader.varint(2**40) == number
    reader.end()
    assert len(written) == max(1, -(-number.bit_length() // 7))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x80",  # cut
        b"\x80\x00",  # longer than needed
        b"\x0b",  # 11, one above the maximum
        b"\xff" * 60_000,
        b"\x80" * 60_000,
    ],
)
def test_bad_varints_are_refused(header: bytes) -> None:
    with pytest.raises(InvalidPayload):
        HeaderReader(header).varint(10)


def test_bytes_left_over_are_refused() -> None:
    reader = HeaderReader(b"\x01\x02")
    reader.varint(1)
    with pytest.raises(InvalidPayload, match="got 1 more bytes"):
        reader.end()


def test_template_check_depends_on_names_and_shapes_alone() -> None:
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    same = {"b": torch.ones(4).half(), "a": torch.ones(2, 3)}
    assert template_check(like) == template_check(same)
    for other in (
        {"a": torch.zeros(3, 2), "b": torch.zeros(4)},
        {"a": torch.zeros(2, 3), "c": torch.zeros(4)},
        {"a": torch.zeros(2, 3)},
    ):
        assert template_check(like) != template_check(other)


def test_groups_are_contiguous_and_do_not_depend_on_order() -> None:
    like = {
        "layer.10.a": torch.zeros(2),
        "layer.2.a": torch.zeros(3),
        "layer.2.b": torch.zeros(4),
        "head": torch.zeros(0),
    }
    groups = group_tensors(like)
    assert [(g.role, g.start, g.stop) for g in groups] == [
        ("head", 0, 0),
        ("layer.*.a", 0, 5),
        ("layer.*.b", 5, 9),
    ]
    assert groups == group_tensors(dict(reversed(like.items())))
    assert list(in_group_order(like)) == [
        "head",
        "layer.10.a",
        "layer.2.a",
        "layer.2.b",
    ]
    assert group_tensors({}) == ()
