"""The status page in a real browser: headless Chromium, as Debian packages it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.selenium_manager import SeleniumManager
from selenium.webdriver.support.ui import WebDriverWait

from server.page import bytes_in_words
from server.status import Snapshot, StatusPage
from tests.snapshots import CLIENT_LEVEL, PRIVACY, record, snapshot

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-dev-shm-usage"),
)

pytestmark = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()),
    reason=f"needs {CHROMIUM} and {DRIVER} (apt-get install chromium chromium-driver)",
)


class Run:
    """What the page reads; a test sets `now`."""

    now: Snapshot = snapshot()

    def __call__(self) -> Snapshot:
        return self.now


def _ask_nobody(*_: object) -> None:
    raise AssertionError("Selenium Manager would look for drivers on the net.")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeleniumManager, "binary_paths", _ask_nobody)
        browser = webdriver.Chrome(options, Service(str(DRIVER)))
    yield browser
    browser.quit()


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def url(run: Run) -> Iterator[str]:
    page = StatusPage(run, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{page.start()}/"
    page.close()


def _look(browser: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def _text(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element(By.ID, name).text


def _picture(browser: webdriver.Chrome, path: Path) -> None:
    """Saves the whole page, not only what the window shows."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    width = browser.execute_script("return window.innerWidth")
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.save_screenshot(str(path))


def test_the_page_follows_a_run_by_itself(browser, run, url, tmp_path):
    _look(browser, 1100)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(url)
    assert browser.title.startswith("Round 2 of 20, running")

    run.now = snapshot(3)
    wait = WebDriverWait(browser, 20)
    wait.until(lambda browser: browser.title.startswith("Round 3 of 20, running"))
    _picture(browser, tmp_path / "running.png")

    run.now = snapshot(20, state="complete", connected=["hospital-a"])
    wait.until(lambda browser: browser.title.startswith("Round 20 of 20, complete"))
    ready = "return document.readyState == 'complete'"
    wait.until(lambda browser: browser.execute_script(ready))  # and it stays, now
    shown = [_text(browser, name) for name in ("spent", "planned", "value", "up")]
    assert shown == ["2.000", "epsilon 7.500", "0.6900", "600 B"]
    assert _text(browser, "unit") == "one example, add-or-remove-one"
    assert _text(browser, "connected") == "1"
    rows = browser.find_elements(By.CSS_SELECTOR, "#rounds ~ table tbody tr")
    assert [row.text for row in rows[:2]] == [
        "20 0.6900 3 of 4 30 B 400 B 7.0 s",
        "19 0.6800 3 of 4 30 B 400 B 7.0 s",
    ]
    assert browser.get_log("browser") == []
    assert _addresses(browser) <= {url, "data:,"}


def _addresses(browser: webdriver.Chrome) -> set[str]:
    """Returns every address that the browser has asked since the last call."""
    messages = [
        json.loads(entry["message"])["message"]
        for entry in browser.get_log("performance")
    ]
    return {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("privacy", ["example", "client"])
def test_a_telephone_needs_no_sideways_scrolling(
    browser, run, url, tmp_path, scheme, privacy
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
    _look(browser, 375, scheme)
    browser.get(url)
    sizes = "let d = document.documentElement; return [d.clientWidth, d.scrollWidth]"
    visible, whole = browser.execute_script(sizes)
    assert whole <= visible <= 375
    for element in browser.find_elements(By.CSS_SELECTOR, "td, th, dd, li, p"):
        box = element.rect
        assert box["x"] >= 0, element.text
        assert box["x"] + box["width"] <= visible, element.text
    _picture(browser, tmp_path / f"telephone-{privacy}-{scheme}.png")


def test_the_dark_page_is_dark_and_the_light_one_light(browser, url, tmp_path):
    paper = "return getComputedStyle(document.body).backgroundColor"
    for scheme, expected in (("light", 251), ("dark", 20)):
        _look(browser, 1100, scheme)
        browser.get(url)
        shade = browser.execute_script(paper)
        assert shade.startswith(f"rgb({expected},")
        _picture(browser, tmp_path / f"{scheme}.png")


def test_the_page_prints_dark_on_white(browser, url, tmp_path):
    browser.get(url)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert browser.execute_script(paper) == "rgb(255, 255, 255)"
    _picture(browser, tmp_path / "print.png")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.slow
def test_the_page_shows_a_real_run_while_it_goes_on(browser, federation, tmp_path):
    one = federation("run.rounds=12")
    server = one.server()
    server.says("Status page: ")
    address = re.search(r"http://127\.0\.0\.1:\d+/", server.output())[0]
    _look(browser, 1100)
    browser.get_log("browser")
    browser.get(address)
    assert browser.title.startswith("Round 0 of 12, waiting")
    clients = [one.client(name) for name in one.names]
    running = re.compile(r"Round (\d+) of 12, running")
    wait = WebDriverWait(browser, 120)
    wait.until(lambda browser: running.match(browser.title))
    shown = browser.execute_script(
        "let text = name => document.getElementById(name).textContent.trim();"
        "return [document.title, text('value'), text('up'), text('connected')]"
    )
    server_round = int(running.match(shown[0])[1])
    lines = (one.run / "events.jsonl").read_text().splitlines()[:server_round]
    records = [json.loads(line) for line in lines]
    sent = bytes_in_words(sum(record["bytes_up"] for record in records))
    assert shown[1:] == [f"{records[-1]['metric']:.4f}", sent, "3"]
    wait.until(lambda browser: not browser.title.startswith(shown[0][:11]))
    assert browser.get_log("browser") == []
    _picture(browser, tmp_path / "real.png")
    for command in (server, *clients):
        command.ends()
