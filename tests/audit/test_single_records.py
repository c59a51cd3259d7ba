"""What a report says and shows of single records: spread, classes, curves, gallery."""

import base64
import io
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fedpeft.audit.exhibits import to_png
from fedpeft.audit.gates import judge_policy
from fedpeft.audit.page.gallery import marked, walls
from fedpeft.audit.page.render import render
from fedpeft.audit.page.roc_figures import roc_pictures
from fedpeft.audit.page.spread_figures import class_tables, spread_pictures
from fedpeft.audit.policy import default_policy
from fedpeft.audit.results import Audit
from tests.audit.examples import (
    SENTENCE,
    audit,
    looking,
    membership,
    open_audit,
    reading,
    span_text,
)


def page(found: Audit) -> str:
    verdict = judge_policy(default_policy(), found)
    return render(found, verdict, document_hash=64 * "a", signed=False)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_a_spread_says_the_average_and_the_worst_record() -> None:
    values = (*49 * (0.1,), 0.6)
    attack = replace(reading(), values={"token_top1": values})
    (picture,) = spread_pictures([attack])
    assert "11 % on average, 60 % for the worst-hit record" in plain(picture.takeaway)
    rows = {row[0]: plain(row[1]) for row in picture.table.rows}
    assert rows["Median"] == rows["Upper quartile"] == "10 %"
    assert (rows["Worst-hit record"], rows["Records"]) == ("60 %", "50")


def test_yes_and_no_have_no_spread_and_neither_has_nothing() -> None:
    yes_or_no = replace(
        reading(),
        values={"token_top1": (1.0, 0.0)},
        control_values={"token_top1": (0.0, 0.0)},
    )
    assert spread_pictures([yes_or_no, span_text()]) == []


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_a_spread_of_unbounded_or_equal_values_is_drawn(odd: float) -> None:
    values = {"psnr": (8.0, odd, 8.0)}
    attack = replace(looking(), values=values, control_values={"psnr": (odd,)})
    (picture,) = spread_pictures([attack])
    assert "nan" not in picture.svg


def test_classes_have_a_table_from_five_victims_of_two_on() -> None:
    ((column, words, table),) = class_tables([reading()])
    assert column == "replay"
    assert plain(words).endswith("the most of class positive, 91 %.")
    assert [(row[0], row[-1]) for row in table.rows] == [
        ("positive", "26"),
        ("negative", "19"),
    ]
    few = dict(reading().by_class)
    few["negative"] = replace(few["negative"], victims=4)
    assert class_tables([replace(reading(), by_class=few)]) == []


def test_a_curve_is_told_at_the_fewest_false_alarms_that_can_be() -> None:
    attack = membership()
    (picture,) = roc_pictures([attack], non_members=100)
    assert "at 1 % false alarms it finds 26 % of the members" in plain(picture.takeaway)
    assert "update 2 %; a coin 1 %." in plain(picture.takeaway)
    rows = [tuple(map(plain, row)) for row in picture.table.rows]
    assert rows == [
        ("10 %", "48 %", "12 %"),
        ("1 %", "26 %\n24 to 28 %", "2 %\n0 to 4 %"),
        ("0.1 %", "\N{EN DASH}", "\N{EN DASH}"),
    ]


@pytest.mark.parametrize("non_members", [None, 5])
def test_with_few_non_members_nothing_is_said_of_few_false_alarms(non_members) -> None:
    coarse = {"auc": (1.0, 0.8, 0.2)}
    attack = membership(metrics={"auc": membership().metrics["auc"]})
    attack = replace(attack, values=coarse, control_values=coarse)
    (picture,) = roc_pictures([attack], non_members)
    assert "at 20 % false alarms it finds 67 %" in plain(picture.takeaway)
    assert {row[1] for row in picture.table.rows} == {"\N{EN DASH}"}


def test_an_attack_without_members_has_no_curve() -> None:
    assert roc_pictures([span_text(), membership().in_short()]) == []


@pytest.mark.parametrize("found", [(1.0, 1.0), (0.0, 0.0)])
def test_all_or_nothing_is_a_curve(found: tuple[float, ...]) -> None:
    same = {"auc": found}
    (picture,) = roc_pictures([membership(values=same, control_values=same)])
    assert "nan" not in picture.svg


def test_words_count_as_often_as_the_record_has_them() -> None:
    assert marked("a a b", "b a") == [("a", True), ("a", False), ("b", True)]
    assert marked("", "a") == []
    (piece,) = marked("x" * 1000, "x")
    assert len(piece[0]) == 400


def test_a_wall_names_its_attack_and_its_places() -> None:
    text, images = walls([reading(), span_text(), looking()])
    assert [place for place, _ in text.exhibits] == ["Best read", "Worst read"]
    places = [place for place, _ in images.exhibits]
    assert places == ["Best read", "Median", "Worst read"]
    assert (text.unit, images.unit) == ("share", "dB")


def test_texts_are_escaped_and_right_words_marked() -> None:
    whole = page(open_audit())
    assert SENTENCE not in whole
    assert "<mark>the film is &lt;b&gt;a&lt;/b&gt; quiet &amp; moving" in whole
    assert "<mark>a</mark> &lt; <mark>b</mark>" in whole
    assert "nothing here was read from this run" in whole


def test_a_page_without_exhibits_shows_nothing() -> None:
    whole = page(audit())
    assert "<img" not in whole
    assert "<mark" not in whole
    assert "Nothing that could be looked at was reconstructed." in whole


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_an_image_is_kept_pixel_by_pixel(channels: int, mode: str) -> None:
    image = torch.zeros(channels, 2, 3)
    image[0, 1, 2] = 1.5
    kept = Image.open(io.BytesIO(base64.b64decode(to_png(image))))
    assert (kept.mode, kept.size) == (mode, (3, 2))
    assert kept.getpixel((2, 1)) == (255 if channels == 1 else (255, 0, 0))


def test_a_large_image_is_made_smaller() -> None:
    kept = Image.open(io.BytesIO(base64.b64decode(to_png(torch.zeros(3, 224, 112)))))
    assert kept.size == (56, 112)
