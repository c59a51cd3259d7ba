"""The status page in a real browser."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from server.page import bytes_in_words
from server.status import Snapshot, StatusPage
from tests.browsing import addresses, browser, look, needs_chromium
from tests.snapshots import CLIENT_LEVEL, PRIVACY, record, snapshot

pytestmark = needs_chromium


class Run:
    """What the page reads; a test sets `now`."""

    now: Snapshot = snapshot()

    def __call__(self) -> Snapshot:
        return self.now


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def url(run: Run) -> Iterator[str]:
    page = StatusPage(run, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{page.start()}/"
    page.close()


def _text(driver: webdriver.Chrome, name: str) -> str:
    return driver.find_element(By.ID, name).text


def _picture(driver: webdriver.Chrome, path: Path) -> None:
    """Saves the whole page, not only what the window shows."""
    height = driver.execute_script("return document.documentElement.scrollHeight")
    width = driver.execute_script("return window.innerWidth")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert driver.save_screenshot(str(path))


def test_the_page_follows_a_run_by_itself(driver, run, url, tmp_path):
    look(driver, 1100)
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(url)
    assert driver.title.startswith("Round 2 of 20, running")

    run.now = snapshot(3)
    wait = WebDriverWait(driver, 20)
    wait.until(lambda driver: driver.title.startswith("Round 3 of 20, running"))
    _picture(driver, tmp_path / "running.png")

    run.now = snapshot(20, state="complete", connected=["hospital-a"])
    wait.until(lambda driver: driver.title.startswith("Round 20 of 20, complete"))
    ready = "return document.readyState == 'complete'"
    wait.until(lambda driver: driver.execute_script(ready))  # and it stays, now
    shown = [_text(driver, name) for name in ("spent", "planned", "value", "up")]
    assert shown == ["2.000", "epsilon 7.500", "0.6900", "600 B"]
    assert _text(driver, "unit") == "one example, add-or-remove-one"
    assert _text(driver, "connected") == "1"
    rows = driver.find_elements(By.CSS_SELECTOR, "#rounds ~ table tbody tr")
    assert [row.text for row in rows[:2]] == [
        "20 0.6900 3 of 4 30 B 400 B 7.0 s",
        "19 0.6800 3 of 4 30 B 400 B 7.0 s",
    ]
    assert driver.get_log("browser") == []
    assert addresses(driver) <= {url, "data:,"}


_OUTSIDE = """
const {clientWidth, scrollWidth} = document.documentElement;
const outside = [...document.querySelectorAll("td, th, dd, li, p")].filter(each => {
  const {left, right} = each.getBoundingClientRect();
  return left < 0 || right > clientWidth;
});
return [clientWidth, scrollWidth, outside.map(each => each.textContent)];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("privacy", ["example", "client"])
def test_a_telephone_needs_no_sideways_scrolling(
    driver, run, url, tmp_path, scheme, privacy
):
    names = [f"hospital-{number}" for number in range(30)] + ["long-name-" * 6]
    codes = {"unknown-client": 2, "a-code-that-is-longer-than-any-telephone-is-wide": 1}
    large = {"replies": 100, "cohort_size": 120, "bytes_up": 1 << 30, "seconds": 5000}
    run.now = snapshot(
        connected=names,
        codes=codes,
        rounds=10_000,
        privacy=CLIENT_LEVEL if privacy == "client" else PRIVACY,
        records=[record(number, **large) for number in range(9_900, 9_920)],
    )
    look(driver, 375, scheme)
    driver.get(url)
    # At once: the page loads itself anew every few seconds.
    visible, whole, outside = driver.execute_script(_OUTSIDE)
    assert whole <= visible <= 375
    assert outside == []
    _picture(driver, tmp_path / f"telephone-{privacy}-{scheme}.png")


def test_the_dark_page_is_dark_and_the_light_one_light(driver, url, tmp_path):
    paper = "return getComputedStyle(document.body).backgroundColor"
    for scheme, expected in (("light", 251), ("dark", 20)):
        look(driver, 1100, scheme)
        driver.get(url)
        shade = driver.execute_script(paper)
        assert shade.startswith(f"rgb({expected},")
        _picture(driver, tmp_path / f"{scheme}.png")


def test_the_page_prints_dark_on_white(driver, url, tmp_path):
    driver.get(url)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert driver.execute_script(paper) == "rgb(255, 255, 255)"
    _picture(driver, tmp_path / "print.png")
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_the_page_shows_a_real_run_while_it_goes_on(driver, federation, tmp_path):
    one = federation("run.rounds=12")
    server = one.server()
    server.says("Status page: ")
    address = re.search(r"http://127\.0\.0\.1:\d+/", server.output())[0]
    look(driver, 1100)
    driver.get_log("browser")
    driver.get(address)
    assert driver.title.startswith("Round 0 of 12, waiting")
    clients = [one.client(name) for name in one.names]
    running = re.compile(r"Round (\d+) of 12, running")
    wait = WebDriverWait(driver, 120)
    wait.until(lambda driver: running.match(driver.title))
    shown = driver.execute_script(
        "let text = name => document.getElementById(name).textContent.trim();"
        "return [document.title, text('value'), text('up'), text('connected')]"
    )
    server_round = int(running.match(shown[0])[1])
    lines = (one.run / "events.jsonl").read_text().splitlines()[:server_round]
    records = [json.loads(line) for line in lines]
    sent = bytes_in_words(sum(record["bytes_up"] for record in records))
    assert shown[1:] == [f"{records[-1]['metric']:.4f}", sent, "3"]
    wait.until(lambda driver: not driver.title.startswith(shown[0][:11]))
    assert driver.get_log("browser") == []
    _picture(driver, tmp_path / "real.png")
    for command in (server, *clients):
        command.ends()
