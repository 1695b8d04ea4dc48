"""A page of the dashboard in a real browser. What it showed is kept in ``build/dashboard/``."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from admin_support import free_port
from node_support import node_config

from kwaainet_bridge.admin_address import TcpAddress

SHOTS = Path(__file__).parents[2] / "build" / "dashboard"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, SCREEN = {"width": 360, "height": 780}, {"width": 1280, "height": 900}
TOKEN = "0123456789abcdef0123"

IN_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: `make browser`"),
]


@contextmanager
def browser():
    """Chromium without a window. Its pages are for the thread that opens it."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "there is no Chromium here: `make browser`"
    with sync_playwright() as playwright:
        # as root its sandbox does not start
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        try:
            yield started
        finally:
            started.close()


class Look:
    """A page in the browser, and all that went wrong in it or was asked of others."""

    def __init__(self, started, address: TcpAddress, *, size=SCREEN, dark=False, path="/") -> None:
        self.context = started.new_context(viewport=size, color_scheme="dark" if dark else "light")
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("request", lambda r: self._check(r.url, address.url))
        self.page.goto(f"{address.url}{path}")

    def _check(self, asked: str, own: str) -> None:
        if not asked.startswith((own, "data:,")):
            self.wrong.append(f"asked {asked}")

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def waits(self, selector: str, text: str) -> None:
        """Wait until it shows a text."""
        self.page.locator(selector, has_text=re.compile(text)).first.wait_for()

    def shot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def tcp_config(folder: Path, name: str, **more):
    return node_config(folder, name, admin={"listen": f"127.0.0.1:{free_port()}"}, **more)


async def in_browser(look) -> None:
    """Run ``look`` in a thread, with the browser."""

    def run() -> None:
        with browser() as started:
            look(started)

    with trio.fail_after(120):
        await trio.to_thread.run_sync(run)
