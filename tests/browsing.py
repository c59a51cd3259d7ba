"""A real browser for pages: headless Chromium, as Debian packages it."""

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.selenium_manager import SeleniumManager

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
    *("--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
)

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()),
    reason=f"needs {CHROMIUM} and {DRIVER} (apt-get install chromium chromium-driver)",
)

_CONTRASTS = """
const channel = value => {
  value /= 255;
  return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
};
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) =>
  0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const contrast = (one, other) => {
  const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const paper = element => {
  for (let each = element; each; each = each.parentElement) {
    const colour = parse(getComputedStyle(each).backgroundColor);
    if (colour.length == 3 || colour[3] == 1) return colour;
  }
  return [255, 255, 255];
};
const opacity = path => {
  const style = getComputedStyle(path);
  return style.fill == 'none' ? 0 : style.fillOpacity * style.opacity;
};
const lies = (element, path) => {
  const [box, ground] = [element, path].map(each => each.getBoundingClientRect());
  const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
  return ground.left <= x && x <= ground.right && ground.top <= y && y <= ground.bottom;
};
const found = [];
for (const element of document.body.querySelectorAll('*')) {
  const own = [...element.childNodes].some(
    node => node.nodeType == 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const drawn = element instanceof SVGElement;
  const ink = parse(drawn ? style.fill : style.color);
  let ground = paper(element);
  const cells = drawn
    ? [...element.ownerSVGElement.querySelectorAll('path')].filter(
        path => opacity(path) > 0 && opacity(path) < 1 && lies(element, path))
    : [];
  for (const cell of cells) {
    const fill = parse(getComputedStyle(cell).fill);
    const share = opacity(cell);
    ground = ground.map((value, k) => (1 - share) * value + share * fill[k]);
  }
  found.push([contrast(ink, ground), element.textContent.trim().slice(0, 60)]);
}
return found;
"""


def _ask_nobody(*_: object) -> None:
    raise AssertionError("Selenium Manager would look for drivers on the net.")


@contextmanager
def browser(profile: Path) -> Iterator[webdriver.Chrome]:
    """Starts Chromium with an empty profile."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SeleniumManager, "binary_paths", _ask_nobody)
        driver = webdriver.Chrome(options, Service(str(DRIVER)))
    yield driver
    driver.quit()


def look(driver: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    """Makes the window so wide, and the reader prefer a scheme."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    media: dict[str, Any] = {"media": "", "features": [feature]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def addresses(driver: webdriver.Chrome) -> set[str]:
    """Returns every address that the browser has asked since the last call."""
    messages = [
        json.loads(entry["message"])["message"]
        for entry in driver.get_log("performance")
    ]
    return {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }


def contrasts(driver: webdriver.Chrome) -> list[tuple[float, str]]:
    """Returns the contrast of every piece of text, the faintest first (WCAG 2.1).

    Letters on a picture's see-through cells count against the cell's mixed colour.
    """
    return sorted((ratio, text) for ratio, text in driver.execute_script(_CONTRASTS))


def printed_pages(driver: webdriver.Chrome) -> int:
    """Prints to PDF and counts its pages."""
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    options = {"preferCSSPageSize": True, "printBackground": True}
    answer = driver.execute_cdp_cmd("Page.printToPDF", options)
    return len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(answer["data"])))
