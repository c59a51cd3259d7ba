"""The report in a real browser."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from fedpeft.audit.gates import judge_policy
from fedpeft.audit.policy import default_policy, parse_policy
from fedpeft.audit.report import write_report
from tests.audit.examples import ALL
from tests.browsing import (
    addresses,
    browser,
    contrasts,
    look,
    needs_chromium,
    printed_pages,
)

pytestmark = needs_chromium
_LEDGER = '[[line]]\ncolumn = "this-run"\ncheck = "ledger of client {}"\n'
_LEDGERS = parse_policy("".join(map(_LEDGER.format, range(5))), "a long policy")
POLICY = replace(_LEDGERS, lines=(*default_policy().lines, *_LEDGERS.lines))
_INSIDE = "data:image/png;base64,"
"""How a picture within the page begins: nobody is asked for it."""
_DRAWN = ("usual", "open", "extreme")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reports")
    for name, make in ALL.items():
        audit = make()
        write_report(audit, judge_policy(POLICY, audit), folder / name)
    return {name: (folder / name / "report.html").as_uri() for name in ALL}


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_asked_for_and_nothing_complains(driver, urls, name):
    look(driver, 1100)
    driver.get_log("browser")
    addresses(driver)
    driver.get(urls[name])
    assert driver.title.startswith("Privacy audit: ")
    asked = {each for each in addresses(driver) if not each.startswith(_INSIDE)}
    assert asked <= {urls[name], "data:,"}
    assert driver.get_log("browser") == []
    assert driver.find_elements(By.TAG_NAME, "script") == []


@pytest.mark.parametrize("name", ALL)
def test_the_first_page_fits_one_sheet_of_a4(driver, urls, name):
    driver.get(urls[name])
    whole = printed_pages(driver)
    driver.execute_script("document.querySelector('main').remove()")
    assert printed_pages(driver) == 1
    assert whole > 2


@pytest.mark.parametrize("name", _DRAWN)
def test_no_table_is_cut_off_on_paper(driver, urls, name):
    look(driver, 695)  # what A4 leaves between its margins
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    driver.get(urls[name])
    cut = driver.execute_script(
        "return [...document.querySelectorAll('.scroll, .gates, dl')]"
        ".filter(each => each.scrollWidth > each.clientWidth + 1)"
        ".map(each => each.textContent.trim().slice(0, 80))"
    )
    assert cut == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ALL)
def test_all_text_stands_out_from_its_ground(driver, urls, name, scheme):
    look(driver, 1100, scheme)
    driver.get(urls[name])
    faintest, text = contrasts(driver)[0]
    assert faintest >= 4.5, text


def test_faint_text_would_be_noticed(driver, urls):
    look(driver, 1100)
    driver.get(urls["usual"])
    plain = {text: ratio for ratio, text in contrasts(driver)}
    assert 4.5 < plain["88\N{NO-BREAK SPACE}%"] < plain["8.9\N{NO-BREAK SPACE}%"]
    driver.execute_script("document.querySelector('h1').style.color = '#999'")
    assert contrasts(driver)[0][0] < 3


@pytest.mark.parametrize("name", ALL)
def test_a_telephone_needs_no_sideways_scrolling(driver, urls, name):
    look(driver, 375)
    driver.get(urls[name])
    sizes = "let d = document.documentElement; return [d.clientWidth, d.scrollWidth]"
    visible, whole = driver.execute_script(sizes)
    assert whole <= visible <= 375
    beyond = driver.execute_script(
        "return [...document.querySelectorAll('.first :is(p, dd, li, th, td)')]"
        ".filter(each => each.getBoundingClientRect().right > innerWidth)"
        ".map(each => each.textContent)"
    )
    assert beyond == []


@pytest.mark.parametrize("name", _DRAWN)
def test_every_figure_has_a_sentence_and_a_table(driver, urls, name):
    look(driver, 1100)
    driver.get(urls[name])
    figures = driver.find_elements(By.TAG_NAME, "figure")
    assert len(figures) >= 3
    for figure in figures:
        caption = figure.find_element(By.TAG_NAME, "figcaption")
        assert caption.text.rstrip().endswith(".")
        assert caption.find_elements(By.CLASS_NAME, "tag")
        assert figure.find_elements(By.CSS_SELECTOR, "tbody tr")
        drawing = figure.find_element(By.TAG_NAME, "svg")
        label = drawing.get_attribute("aria-label").replace("\N{NO-BREAK SPACE}", " ")
        assert label in caption.text
        assert drawing.rect["height"] > 40


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_seeded_noise_is_red(driver, urls, scheme):
    look(driver, 1100, scheme)
    driver.get(urls["seeded"])
    colour = driver.find_element(By.ID, "noise").value_of_css_property("color")
    red, green, blue = (int(part) for part in colour[5:].split(",")[:3])
    assert red > 1.4 * max(green, blue)


def test_pictures_follow_the_scheme(driver, urls):
    shades = {}
    for scheme in ("light", "dark"):
        look(driver, 1100, scheme)
        driver.get(urls["usual"])
        letters = driver.find_element(By.CSS_SELECTOR, "figure svg text")
        shades[scheme] = letters.value_of_css_property("fill")
    assert shades["light"] != shades["dark"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_exhibits_are_shown_with_words_beside_them(driver, urls, scheme):
    look(driver, 375, scheme)
    driver.get(urls["open"])
    images = driver.find_elements(By.CSS_SELECTOR, ".plates img")
    assert len(images) == 9
    assert len({round(image.rect["y"]) for image in images}) == 3
    for image in images:
        assert image.get_property("naturalWidth") == 14
        assert image.get_attribute("alt").startswith(("Best", "Median", "Worst"))
        assert image.value_of_css_property("image-rendering") == "pixelated"
    right = driver.find_element(By.TAG_NAME, "mark")
    assert right.value_of_css_property("font-weight") == "700"
    assert "underline" in right.value_of_css_property("text-decoration")


@pytest.mark.parametrize("name", ["usual", "open"])
def test_ids_on_the_page_are_unique(driver, urls, name):
    driver.get(urls[name])
    ids = driver.execute_script(
        "return [...document.querySelectorAll('[id]')].map(element => element.id)"
    )
    assert len(ids) == len(set(ids))
