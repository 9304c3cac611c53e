"""A newcomer in a real browser: types a prompt on the embedded model and sees its features."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The app as a user starts it, on a free port."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have a browser: install Debian's chromium")
        pytest.skip("no Chromium on this machine")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("app") / "log").open("w")
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://localhost:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the app did not start"
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)
        log.close()


def test_type_a_prompt_and_see_its_features(address):
    from playwright.sync_api import sync_playwright

    outside, errors = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None,
        )
        page.goto(f"{address}/prompt")
        box = page.get_by_role("textbox", name="Prompt")
        box.wait_for(timeout=120_000)
        page.get_by_text("Where a feature reads from").wait_for(timeout=120_000)
        box.fill("one two three four. one two three")
        box.press("Control+Enter")
        page.wait_for_url("**prompt=one*", timeout=60_000)
        page.get_by_text("fires with").wait_for(timeout=60_000)
        page.get_by_role("combobox", name="Head").click()
        page.get_by_role("option", name="4", exact=True).click()
        page.wait_for_url("**head=4*", timeout=60_000)
        sentence = page.get_by_text("of head 4 at").first
        sentence.wait_for(timeout=60_000)
        link, shown = page.url, sentence.inner_text()
        assert "induction" in shown, shown

        fresh = browser.new_context().new_page()
        fresh.goto(link)
        restored = fresh.get_by_text("of head 4 at").first
        restored.wait_for(timeout=60_000)
        assert restored.inner_text() == shown, "the address restores the page"
        browser.close()
    assert not errors
    assert not outside, "no request may leave the machine"
