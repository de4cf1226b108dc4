"""A headless Chromium, from Debian's packages chromium and chromium-driver, controlled by selenium."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

Found = TypeVar("Found")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
WAIT_S = 60.0  # long enough for a busy machine
needs_chromium = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="NO CHROMIUM: apt-get install -y chromium chromium-driver"
)
PHONE = 390, 844


class Page:
    """The console in a browser."""

    def __init__(self, driver: webdriver.Chrome, url: str):
        self.driver, self.url = driver, url

    def open(self, hash_: str = "") -> "Page":
        self.driver.get("about:blank")
        self.complaints()  # an earlier test's
        self.driver.get(f"{self.url}/fedrouter/{hash_}")
        return self

    def find(self, selector: str) -> Any:
        return self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, selector), selector)[0]

    def text(self, selector: str) -> str:
        """Return an element's visible text; "" if the element does not exist."""
        return next(iter(self.texts(selector)), "")

    def texts(self, selector: str) -> list[str]:
        """Return elements' visible texts, in one step, since the page may replace the elements."""
        shown = "e => e.checkVisibility() ? e.innerText.trim() : ''"
        script = f"return [...document.querySelectorAll(arguments[0])].map({shown})"
        return list(self.driver.execute_script(script, selector))

    def until(self, what: Callable[[], Literal[False] | Found], why: str = "") -> Found:
        """Wait until a condition is true; return its value."""
        gone = [StaleElementReferenceException]
        wait = WebDriverWait(self.driver, WAIT_S, poll_frequency=0.02, ignored_exceptions=gone)
        return wait.until(lambda _: what(), f"waited for {why or what}")

    def shows(self, selector: str, text: str) -> str:
        return self.until(
            lambda: text in self.text(selector) and self.text(selector), f"{text!r} in {selector}"
        )

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type(self, text: str, send: bool = False) -> None:
        self.find("#prompt").send_keys(text + (Keys.ENTER if send else ""))

    def choose(self, selector: str, option: str) -> None:
        box = self.find(selector)
        self.until(lambda: option in [one.text for one in Select(box).options], f"option {option}")
        Select(box).select_by_visible_text(option)

    def tab(self, name: str) -> None:
        self.click(f"#tab-{name}")
        self.until(lambda: self.find(f"#{name}").is_displayed(), name)

    def complaints(self) -> list[str]:
        """Return the browser's errors since the last call: scripts, CSP, requests."""
        return [one["message"] for one in self.driver.get_log("browser") if one["level"] == "SEVERE"]

    def js(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def chromium(size: tuple[int, int] = (1280, 900), dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Run a browser with a window of that size within the context."""
    assert BROWSER and DRIVER
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-proxy-server",
    ]
    for flag in [*flags, f"--window-size={size[0]},{size[1]}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    if size[0] < 500:  # narrower than any window can be
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 2, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    if dark:
        scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    try:
        yield driver
    finally:
        driver.quit()
