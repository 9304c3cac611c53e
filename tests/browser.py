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
from random import Random
from urllib.parse import parse_qsl, urlsplit

from playwright.sync_api import Browser, Locator, TimeoutError, sync_playwright
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from tests.helpers import PATIENCE, ROOT, find_chromium

ATTEMPTS = [3_000 * 2**i for i in range(9)]  # ms that what may go unnoticed is waited for, before it is done again

PROMPTS = ["one two three four. one two three", "a *b* $c$ d a *b*", "Paris, London, Paris"]
_KINDS = ("Selectbox", "MultiSelect", "ButtonGroup", "Checkbox", "Slider", "TextArea", "TextInput", "NumberInput")
# Of a page, all that are bound to its address: labels and notes of a feature are written down elsewhere.
_CONTROLS = ",".join(f"[data-testid=st{kind}]:not([class*=st-key-notes] *, [class*=st-key-lists_])" for kind in _KINDS)


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
        self.page.on("websocket", self._connected)
        self._asked = True  # for a run of the script that is not finished

    def open(self, path: str) -> None:
        self.page.goto(f"{self.address}/{path}")

    def addressed(self, **held: str) -> None:
        """Wait until the address holds these, in any order, each at least as its beginning; "" means not at all."""
        self.page.wait_for_url(lambda url: _holds(url, held))

    def idle(self) -> None:
        """Wait until the script has run and everything is drawn: a list that is open would close."""
        while True:
            self.page.wait_for_timeout(300)  # a change that was just made starts the script
            self.page.wait_for_function(
                "document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'"
                " && !document.querySelector('[data-stale=true], [data-testid=stSkeleton], [data-testid=stSpinner]')"
            )
            if not self._asked:
                return

    def choose(self, name: str, option: str) -> None:
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

    def shown(self) -> tuple[str, list[str], list[str]]:
        """What a person sees, but for what is painted on a canvas: address, text, and what the controls hold.

        The lines are sorted: Vega draws the labels of an axis in any order. So are the parts of the address.
        """
        self.idle()
        self.page.evaluate("document.activeElement.blur()")  # a field that is written in says how to apply it
        main = self.page.get_by_test_id("stMain")
        held = "all => all.map(one => one.type == 'checkbox' ? one.checked : one.value ?? one.ariaValueText)"
        return (
            "&".join(sorted(self.page.url.replace("?", "&").split("&"))),
            sorted(main.inner_text().splitlines()),
            main.locator("input, textarea, [role=slider]").evaluate_all(held),
        )

    def change(self, random: Random) -> str:
        """Set one of the controls of the page by hand, which one and to what by chance; says which."""
        self.idle()
        controls = self.page.get_by_test_id("stMain").locator(_CONTROLS).locator("visible=true")
        control = controls.nth(random.randrange(controls.count()))
        kind = control.get_attribute("data-testid") or ""
        done = f"{kind}: {control.inner_text().splitlines()[:1]}"
        control.scroll_into_view_if_needed()
        match kind:
            case "stSelectbox" | "stMultiSelect":
                box, options = control.get_by_role("combobox"), self.page.get_by_role("option")
                try:
                    box.click()
                    options.first.wait_for(timeout=ATTEMPTS[0])
                    chosen = random.randrange(options.count() or 1)  # it closes where something is drawn anew
                    options.nth(chosen).click(timeout=ATTEMPTS[0])
                except TimeoutError:  # a list of what can be added may be empty
                    self.page.keyboard.press("Escape")
            case "stButtonGroup":
                buttons = control.get_by_role("radio")
                buttons.nth(random.randrange(buttons.count())).click()
            case "stCheckbox":
                control.locator("label").click()
            case "stSlider":
                thumbs = control.get_by_role("slider")
                thumbs.nth(random.randrange(thumbs.count())).press(random.choice(["ArrowLeft", "ArrowRight"]))
            case "stTextArea":
                self._write(control, random.choice(PROMPTS), "Control+Enter")
            case "stTextInput":
                self._write(control, random.choice(["the", "0.5", "16, 32", "cpu"]), "Enter")
            case "stNumberInput":
                self._write(control, str(random.randrange(1, 9)), "Enter")
        return done

    def _write(self, control: Locator, text: str, apply: str) -> None:
        box = control.locator("input, textarea")
        box.fill(text)
        box.press(apply)

    def leave(self) -> None:
        """Go, having seen no error and asked no other machine."""
        self.page.context.close()
        assert not self.errors
        assert not self.outside, "no request may leave the machine"

    def _console(self, message) -> None:
        # At a page's own address Streamlit asks for its health below that address first, and gets a 404.
        if message.type == "error" and "/_stcore/" not in message.location.get("url", ""):
            self.errors.append(message.text)

    def _connected(self, socket) -> None:
        socket.on("framesent", self._sent)
        socket.on("framereceived", self._received)

    def _sent(self, frame: bytes) -> None:
        if BackMsg.FromString(frame).WhichOneof("type") == "rerun_script":
            self._asked = True

    def _received(self, frame: bytes) -> None:
        message = ForwardMsg.FromString(frame)
        if message.WhichOneof("type") == "script_finished":
            self._asked = message.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN

    def _request(self, request) -> None:
        if not request.url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.outside.append(request.url)


def _holds(url: str, held: dict[str, str]) -> bool:
    address = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    return all(address.get(key, "").startswith(value) if value else key not in address for key, value in held.items())
