"""The app in a real browser: first paint, page changes, and a prompt of 64 tokens; on the shipped checkpoints.

python -m benchmarks.app
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

PORT, ROUNDS = 8599, 5
PAGES = ["Tradeoffs", "Heads", "Features", "Prompt", "Compare", "Runs"]
TEXT = (
    "Fellow citizens of the Senate and of the House of Representatives, I congratulate you on the state of the nation. "
)
_IDLE = """() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState === 'notRunning'
    && !document.querySelector('[data-stale=true], [data-testid=stSkeleton], [data-testid=stSpinner]')
    && document.querySelector('[data-testid=stMain] h1')"""


def idle(page: Page) -> None:
    """Wait until the script has not run, and nothing was stale or missing, for 300 ms."""
    calm = 0
    while calm < 10:
        calm = calm + 1 if page.evaluate(_IDLE) else 0
        page.wait_for_timeout(30)


def seconds(page: Page, act, title: str | None = None) -> tuple[float, float]:
    """From an act to the page's title, and to the page complete; 300 ms of waiting subtracted."""
    started = time.perf_counter()
    act()
    if title:
        page.get_by_role("heading", name=title, exact=True).wait_for()
    painted = time.perf_counter() - started
    idle(page)
    return painted, time.perf_counter() - started - 0.3


def row(name: str, values: list[tuple[float, float]]) -> None:
    first, whole = (statistics.median(each) for each in zip(*values, strict=True))
    slowest = max(each for _, each in values)
    print(f"| {name} | {first:.2f} | {whole:.2f} | {slowest:.2f} |", flush=True)


def main() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={PORT}"]
    server = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://localhost:{PORT}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"),
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.set_default_timeout(120_000)
            print(f"{os.cpu_count()} cores, {ROUNDS} rounds, headless Chromium beside the server\n")
            print("| | to the title, s (median) | to the page complete, s (median) | slowest |\n|---|---|---|---|")
            row("first visit, imports included", [seconds(page, lambda: page.goto(address), "Tradeoffs")])

            def go(name: str) -> tuple[float, float]:
                return seconds(page, page.get_by_role("link", name=name, exact=True).click, name)

            for name in PAGES[1:]:
                row(f"{name}, first time", [go(name)])
            fresh = [browser.new_page() for _ in range(ROUNDS)]
            visits = [seconds(each, lambda e=each: e.goto(address), "Tradeoffs") for each in fresh]
            row("new session, imports done", visits)
            for each in fresh:
                each.close()
            for name in PAGES:
                values = []
                for _ in range(ROUNDS):
                    go(PAGES[(PAGES.index(name) + 1) % len(PAGES)])
                    values.append(go(name))
                row(f"to {name}, caches warm", values)
            go("Prompt")
            values = []
            for index in range(ROUNDS):
                box = page.get_by_role("textbox", name="Prompt")
                box.fill(f"{index} " + TEXT * 3)
                values.append(seconds(page, lambda b=box: (b.press("Control+Enter"), page.wait_for_timeout(100))))
            row("a new prompt of 66 tokens", values)
            browser.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
