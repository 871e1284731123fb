"""A real browser for tests, at the pages of the platform: press a button, fill a field, log in."""

from collections.abc import Iterator

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement

from tests.conftest import chromium
from tests.services.platform import Platform, until


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    window = chromium(1400, 1500)
    yield window
    window.quit()


@pytest.fixture
def page(browser: WebDriver) -> Iterator[WebDriver]:
    """The browser, which leaves its page in the end: a drawn graph keeps a core busy."""
    yield browser
    browser.get("about:blank")


def by_text(window: WebDriver, tag: str, text: str) -> list[WebElement]:
    return window.find_elements(By.XPATH, f"//{tag}[normalize-space(.)='{text}']")


def click(window: WebDriver, tag: str, text: str) -> None:
    """Press what bears this text, once it is there."""

    def pressed() -> bool:
        for element in by_text(window, tag, text):
            if element.is_displayed():
                window.execute_script("arguments[0].click()", element)
                return True
        return False

    until(pressed, f"something to press that says {text!r}", 60)


def fill(window: WebDriver, section: str, label: str, value: str) -> None:
    """Write into the field `label` of the form's section, instead of what is there."""
    named = "//span[contains(@class, 'schema-form-property__label') and normalize-space(.)='{}']"
    place = f"{named.format(section)}/following::{named.format(label)[2:]}[1]/following::input[1]"
    _write(window, place, f"{section} {label}", value)


def fill_new(window: WebDriver, label: str, value: str) -> None:
    """Write into the field `label` of the form of Prefect's new page, instead of what is there."""
    _write(window, f"//label[normalize-space(.)='{label}']/following::input[1]", label, value)


def _write(window: WebDriver, place: str, label: str, value: str) -> None:
    def written() -> bool:
        """The page may draw the form anew while its data arrive: then the field is found and written again."""
        try:
            (field, *_) = window.find_elements(By.XPATH, place)
            window.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
            field.send_keys(Keys.CONTROL, "a")
            field.send_keys(value)
            return field.get_attribute("value") == value
        except (ValueError, WebDriverException):
            return False

    until(written, label, 60)


def log_in(window: WebDriver, platform: Platform) -> None:
    """Give the page the password that it asks for, once; then it shows what was asked for."""
    (asked,) = until(lambda: window.find_elements(By.CSS_SELECTOR, "input[type='password']"), "it asks", 60)
    asked.send_keys(platform.config.prefect_password or "", Keys.ENTER)
    until(lambda: "/login" not in window.current_url, "the password is taken", 60)


def rest(page: WebDriver) -> None:
    """Leave the page while a test waits: Prefect's graph is drawn 60 times a second, on the cores of the run."""
    page.get("about:blank")


def says(window: WebDriver, text: str) -> bool:
    return text in window.find_element(By.TAG_NAME, "body").text
