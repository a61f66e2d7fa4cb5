"""A visitor of the page: a headless Chromium that finds things as a reader does, by their labels and words."""

import json
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--no-first-run", "--disable-background-networking",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
PATIENCE_S = 20.0


class Visitor:
    """One window. Every wait is for a condition, and fails after PATIENCE_S."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """A fresh load, also where only the part behind # differs."""
        self.driver.get("about:blank")
        self.driver.get(url)
        self.until(lambda: "Asking" not in self.text("#about"), "the page says what is served")

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """What the condition returns once that is true."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = condition()
            if found:
                return found
            assert time.monotonic() < deadline, f"waited in vain until {what}; errors: {self.errors()}"
            time.sleep(0.02)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.script("return document.querySelector(arguments[0]).textContent", selector).strip()

    def seen(self, selector: str) -> bool:
        return self.find(selector).is_displayed()

    def script(self, code: str, *values: Any) -> Any:
        return self.driver.execute_script(code, *values)

    def field(self, label: str) -> WebElement:
        """The visible control that a label names."""
        (found,) = self.script("""
            return [...document.querySelectorAll('input, select, textarea, button')].filter(one => one.checkVisibility()
              && (one.labels?.length ? [...one.labels] : [one]).some(name => name.textContent.trim() === arguments[0]))
            """, label)
        assert found.accessible_name == label
        return found

    def fill(self, label: str, text: str) -> None:
        control = self.field(label)
        control.clear()
        control.send_keys(text)

    def paste(self, label: str, text: str) -> None:
        """A long text at once."""
        self.script("arguments[0].value = arguments[1]", self.field(label), text)

    def choose(self, label: str, option: str) -> None:
        Select(self.field(label)).select_by_visible_text(option)

    def press(self, label: str) -> None:
        self.field(label).click()

    def type(self, *keys: str) -> None:
        """On the keyboard, to whatever has the focus."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """The accessible name of what has the focus."""
        return self.driver.switch_to.active_element.accessible_name

    def tab_to(self, label: str) -> None:
        """With the Tab key alone."""
        for _ in range(400):
            if self.focused() == label:
                return
            self.type(Keys.TAB)
        raise AssertionError(f"{label} cannot be reached with the Tab key")

    def ask(self, user: str, **fields: str) -> None:
        """Asks for a user with the form and waits for the answer."""
        before = self.text("#facts")
        self.fill("User id", user)
        for label, text in fields.items():
            self.fill(label, text)
        self.press("Show the funnel")
        self.until(lambda: self.text("#facts") != before, "there is an answer")

    def explain(self, item: str) -> None:
        """Asks for an item and waits for what the server says of it."""
        self.fill("Item id", item)
        self.press("Explain")
        self.until(lambda: self.text("#verdict").startswith(f"Item {item} ") and self.all("#details dt"), "it is told")

    def rows(self, table: str) -> list[list[str]]:
        """The texts of the cells of a table's body, without what only a screen reader gets."""
        return self.script("""
            return [...document.querySelector(arguments[0]).tBodies[0].rows].map(row => [...row.cells].map(cell => {
              const copy = cell.cloneNode(true);
              copy.querySelectorAll('.unseen').forEach(part => part.remove());
              return copy.textContent.trim();
            }))""", table)

    def errors(self) -> list[str]:
        """What the error regions say."""
        return [text for one in self.all("[role=alert], #about.error") if (text := one.text)]

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, scheme: str) -> None:
        """A light or a dark page."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What stands in the console, but for the replies of the API that are errors: the page shows those."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")
                and not (entry["source"] == "network" and "/v1/" in entry["message"])]

    def hosts_asked(self) -> set[str]:
        """Every host and port that the window has sent a request to since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return {urllib.parse.urlsplit(url).netloc for url in urls} - {""}


def visitors() -> Iterator[Visitor]:
    """One visitor, or a skip where there is no Chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    window.set_script_timeout(PATIENCE_S)
    try:
        yield Visitor(window)
    finally:
        window.quit()
