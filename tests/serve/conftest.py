"""A browser for the tests of the page."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.page_visitor import Visitor


@pytest.fixture(scope="session")
def browser() -> "Iterator[Visitor]":
    """One Chromium for the session; a skip without selenium or Chromium."""
    pytest.importorskip("selenium", reason="needs selenium (pip install -e '.[dev]')")
    from tests.page_visitor import visitors

    yield from visitors()


@pytest.fixture
def visitor(browser: "Visitor") -> "Iterator[Visitor]":
    """The browser with a window of usual size; behind each test the console is empty, and nobody else was asked."""
    browser.size(1000)
    browser.prefer("light")
    browser.complaints()
    browser.hosts_asked()
    yield browser
    assert browser.complaints() == []
    assert all(host.startswith("127.0.0.1:") for host in browser.hosts_asked())
