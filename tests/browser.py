"""A person at the app: a server as a user starts it, a browser, and a visitor who sets controls by hand."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from playwright.sync_api import Browser, TimeoutError, sync_playwright

from tests.helpers import PATIENCE, ROOT, find_chromium

ATTEMPTS = [3_000 * 2**i for i in range(9)]  # ms that what may go unnoticed is waited for, before it is done again


@contextmanager
def serve(log: Path, **environment: str) -> Iterator[str]:
    """The app as a user starts it, on a free port: its address. What it prints goes to `log`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    with log.open("w") as file:
        server = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)
    url = f"http://localhost:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=PATIENCE)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, "the app did not start"
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)


@contextmanager
def browse() -> Iterator[Browser]:
    """A browser; without one the test that asks is skipped, but fails in CI."""
    path = find_chromium()  # before Playwright is started, which fails where there is none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            timeout=1000 * PATIENCE,
        )
        yield browser
        browser.close()


class Visitor:
    """A fresh profile, which notes every error and every request that leaves the machine."""

    def __init__(self, chromium: Browser, address: str) -> None:
        self.address, self.errors, self.outside = address, [], []
        context = chromium.new_context(viewport={"width": 1400, "height": 1200})
        context.set_default_timeout(1000 * PATIENCE)  # also of the pages that a page opens
        self.page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._console)
        self.page.on("request", self._request)

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}/{path}")

    def idle(self) -> None:
        """Wait until the script has run and everything is drawn: a list that is open would close."""
        self.page.wait_for_function(
            "document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'"
            " && !document.querySelector('[data-stale=true], [data-testid=stSkeleton], [data-testid=stSpinner]')"
        )

    def choose(self, name: str, option: str) -> None:
        self.page.wait_for_timeout(300)  # a change that was just made starts the script
        self.idle()
        box = self.page.get_by_role("combobox", name=name, exact=True).first  # an old one may still be fading
        for patience in ATTEMPTS:
            box.scroll_into_view_if_needed()
            self.page.wait_for_timeout(300)
            box.fill(option)  # by keyboard, and after scrolling: a list that scrolls closes
            with suppress(TimeoutError):  # something was drawn anew, which closes the list too
                self.page.get_by_role("option", name=option, exact=True).wait_for(timeout=patience)
                box.press("Enter")
            box.blur()
            self.idle()
            if box.input_value() == option:
                return
        raise AssertionError(f"no {option} under {name}")

    def prompt(self, text: str) -> None:
        box = self.page.get_by_role("textbox", name="Prompt")
        box.fill(text)
        box.press("Control+Enter")

    def leave(self) -> None:
        """Go, having seen no error and asked no other machine."""
        self.page.context.close()
        assert not self.errors
        assert not self.outside, "no request may leave the machine"

    def _console(self, message) -> None:
        # At a page's own address Streamlit asks for its health below that address first, and gets a 404.
        if message.type == "error" and "/_stcore/" not in message.location.get("url", ""):
            self.errors.append(message.text)

    def _request(self, request) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.outside.append(request.url)
