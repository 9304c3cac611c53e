"""A newcomer in a real browser: types a prompt on the embedded model and sees its features."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
from playwright.sync_api import TimeoutError, sync_playwright

from tests.helpers import PATIENCE, ROOT, find_chromium

ATTEMPTS = [3_000 * 2**i for i in range(9)]  # ms that what may go unnoticed is waited for, before it is done again


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    """The app as a user starts it, on a free port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("app") / "log").open("w")
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={port}"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
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
        log.close()


@pytest.fixture(scope="module")
def chromium():
    path = find_chromium()  # before Playwright is started, which fails where there is none
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            timeout=1000 * PATIENCE,
        )
        yield browser
        browser.close()


def test_without_a_browser_these_tests_are_skipped_but_not_in_ci(tmp_path):
    command = [sys.executable, "-m", "pytest", "-n", "0", "-rs", "-p", "no:cacheprovider", __file__, "-k", "markup"]
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"PATH": str(tmp_path)}
    for more, status, sentence in (({}, 0, "no Chromium on this machine"), ({"CI": "1"}, 1, "CI must have a browser")):
        done = subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=PATIENCE
        )
        assert (done.returncode, sentence in done.stdout) == (status, True), done.stdout[-2000:]


class Visitor:
    """A fresh profile, which notes every error and every request that leaves the machine."""

    def __init__(self, chromium, address: str) -> None:
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


@pytest.fixture
def visitor(chromium, address):
    fresh = Visitor(chromium, address)
    yield fresh
    fresh.leave()


def test_from_a_token_to_the_reason_why(visitor, chromium, address):
    """Token, head, feature, source, ablation, link: on the induction prompt of the tour."""
    page = visitor.page
    visitor.open("prompt")
    page.get_by_role("button", name="Induction", exact=True).click()
    page.get_by_text("Where a feature reads from").wait_for()
    for head in ("3", "4", "5"):
        visitor.choose("Head", head)
        page.wait_for_url(f"**head={head}*")
        sentence = page.get_by_text(f"of head {head} at").first
        sentence.wait_for()
    visitor.choose("Head", "4")
    visitor.choose("Token", "19: \u00b7the")
    sentence = page.get_by_text("of head 4 at 19").first
    sentence.wait_for()
    assert "its largest source is 6: \u00b7mat (induction)" in sentence.inner_text()
    visitor.choose("Take away or replace", "all features of a head")
    visitor.choose("Which head", "4")
    page.wait_for_url("**which=4*")
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.idle()
    link, shown = page.url, sentence.inner_text()

    fresh = Visitor(chromium, address)
    fresh.page.goto(link)
    restored = fresh.page.get_by_text("of head 4 at 19").first
    restored.wait_for()
    assert restored.inner_text() == shown, "the address restores the page"
    shares = re.compile(r"After 19: \u00b7the: \u00b7mat 4[67]\.\d% as it is, 3[23]\.\d% without \(full\)")
    fresh.page.get_by_text(shares).wait_for()
    dashboard = fresh.page.get_by_role("link", name="Its dashboard")
    dashboard.click()
    fresh.page.get_by_role("heading", name=re.compile(r"Feature \d+ of head 4")).wait_for()
    fresh.page.get_by_text("Nearest features").wait_for()
    fresh.leave()


def test_two_sessions_at_once_get_their_own_answers(chromium, address):
    prompts = {"one two three four. one two three": "four", "red green blue red green": "blue"}
    visitors = [Visitor(chromium, address) for _ in prompts]
    for visitor in visitors:
        visitor.open("prompt")
    for visitor in visitors:
        visitor.page.get_by_text("Where a feature reads from").wait_for()
    for visitor, text in zip(visitors, prompts, strict=True):
        visitor.prompt(text)
    for visitor, text in zip(visitors, prompts, strict=True):
        visitor.page.wait_for_url(f"**{text.split()[0]}*")
        visitor.choose("Take away or replace", "the whole layer, by its reconstruction")
    for visitor, following in zip(visitors, prompts.values(), strict=True):
        visitor.page.get_by_text(re.compile(rf"After \d+: \S+: \u00b7{following} \d")).wait_for()
        visitor.leave()


def test_a_deviant_feature_is_one_click_away(visitor):
    page = visitor.page
    visitor.open("heads?show=Monosemanticity&of_head=8")
    page.get_by_role("heading", name="Features of head 8 that deviate").wait_for()
    visitor.idle()
    table = page.locator("[data-testid=stDataFrame]").nth(1)
    for patience in ATTEMPTS:
        table.scroll_into_view_if_needed()
        place = table.bounding_box()
        with suppress(TimeoutError), page.context.expect_page(timeout=patience) as opened:
            for step in (0, 2):  # a canvas: the mouse must come before it clicks
                page.mouse.move(place["x"] + 16 + step, place["y"] + 51 + step)
                page.wait_for_timeout(400)
            page.mouse.down()
            page.mouse.up()
        if opened.is_done():
            break
    opened.value.get_by_role("heading", name=re.compile(r"Feature \d+ of head 8")).wait_for()


def test_the_address_says_what_is_shown(visitor):
    """Streamlit leaves in the address what is no option any more, and leaves defaults out of it."""
    page = visitor.page
    visitor.open("prompt")
    page.get_by_text("of head").first.wait_for()
    visitor.choose("Token", "17: \u00b7sat")
    visitor.choose("Predict after token", "10: \u00b7ran")
    page.wait_for_url("**predict=10*token=17*")
    page.get_by_role("button", name="Duplicate token", exact=True).click()
    page.wait_for_url("**prompt=Paris*")
    visitor.idle()
    page.get_by_role("button", name="Induction", exact=True).click()
    page.wait_for_url(f"{visitor.address}/prompt?checkpoint=smollm2-135m-L17-batchtopk-x8-k32")
    visitor.idle()
    other = "smollm2-135m-L17-batchtopk-x8-k64"
    visitor.choose("Checkpoint", other)
    page.wait_for_url(f"**checkpoint={other}*")
    visitor.idle()
    page.get_by_role("link", name="Its dashboard").click()
    page.get_by_text("Nearest features").wait_for()
    visitor.idle()
    assert f"checkpoint={other}" in page.url and "feature=" in page.url


def test_markup_in_a_prompt_only_appears(visitor):
    page = visitor.page
    visitor.open("prompt")
    page.get_by_text("Where a feature reads from").wait_for()
    visitor.prompt("<img src=x onerror=document.title='owned'> <script>document.title='owned'</script> \u202e [a](b)")
    page.wait_for_url("**onerror*")
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.idle()
    assert "owned" not in page.title()
    assert page.locator("[data-testid=stMain] img").count() == 0


@pytest.mark.parametrize("path", ["", "heads?show=Roles", "features", "compare", "runs"])
def test_every_page_comes_up_without_errors(visitor, path):
    visitor.open(path)
    visitor.page.get_by_role("button", name="Copy link").wait_for()
    visitor.idle()
    assert visitor.page.locator("[data-testid=stException]").count() == 0
