"""The app in a real browser on the shipped checkpoints: first paint, page changes, prompts, ten sessions at once.

python -m benchmarks.app
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[1]
PORT, ROUNDS, SESSIONS = 8599, 5, 10
WIDE = "wide"
PAGES = ["Tradeoffs", "Heads", "Features", "Prompt", "Compare", "Runs"]
TEXT = (
    "Fellow citizens of the Senate and of the House of Representatives, I congratulate you on the state of the nation. "
)
_SHOWN = """() => location.href
    + [...document.querySelectorAll('[data-testid=stText]')].map((each) => each.textContent).join()"""
_DRAWN = (
    "() => document.querySelector(':is([data-testid=stVegaLiteChart], [data-testid=stDataFrame]) :is(canvas, svg)')"
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


def seconds(page: Page, act: Callable[[], object], title: str) -> tuple[float, float]:
    """From an act to the page's title with its first chart or table, and to the page complete (less 300 ms)."""
    started = time.perf_counter()
    act()
    page.get_by_role("heading", name=title, exact=True).wait_for()
    page.wait_for_function(_DRAWN)
    useful = time.perf_counter() - started
    idle(page)
    return useful, time.perf_counter() - started - 0.3


def row(name: str, values: list[tuple[float, float]]) -> None:
    useful, whole = zip(*values, strict=True)
    print(f"| {name} | {spread(useful)} | {spread(whole)} |", flush=True)


def spread(values: list[float]) -> str:
    """Median (and slowest)."""
    return f"{statistics.median(values):.2f}" + (f" ({max(values):.2f})" if len(values) > 1 else "")


def resident(pid: int) -> float:
    """GB of main memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def fill(page: Page, name: str, text: str) -> Callable[[], None]:
    """Type into a text box; returns what sends it."""
    box = page.get_by_role("textbox", name=name)
    box.fill(text)
    return lambda: box.press("Control+Enter")


def search(page: Page, text: str) -> None:
    """Look for features that fire on a token."""
    box = page.get_by_role("combobox", name="Fires on", exact=True)
    box.fill(text)
    box.press("Enter")


def choose(page: Page, name: str, option: str) -> None:
    """Choose in a select box, by keyboard."""
    box = page.get_by_role("combobox", name=name, exact=True)
    box.fill(option)
    page.get_by_role("option", name=option, exact=True).wait_for()
    box.press("Enter")


def until_idle(page: Page, act: Callable[[], object]) -> float:
    """Seconds from an act to the page complete."""
    started = time.perf_counter()
    act()
    idle(page)
    return time.perf_counter() - started - 0.3


def chosen(page: Page, act: Callable[[], object]) -> tuple[float, float]:
    """From a choice to the first sentence that it changes, or its place in the address, and to the page complete."""
    before = page.evaluate(_SHOWN)
    started = time.perf_counter()
    act()
    page.wait_for_function(f"before => ({_SHOWN})() !== before", arg=before)
    answered = time.perf_counter() - started
    idle(page)
    return answered, time.perf_counter() - started - 0.3


def prompts(page: Page, texts: list[str]) -> list[float]:
    """Seconds from sending each prompt to the page complete."""
    taken = []
    for text in texts:
        taken.append(until_idle(page, fill(page, "Prompt", text)))
    return taken


def together(pages: list[Page], texts: list[str]) -> list[float]:
    """Every session sends its prompt at the same moment; seconds until each is complete."""
    sends = [fill(page, "Prompt", text) for page, text in zip(pages, texts, strict=True)]
    started = time.perf_counter()
    for send in sends:
        send()
    calm, done = dict.fromkeys(pages, 0), {}
    while len(done) < len(pages):
        for page in pages:
            calm[page] = calm[page] + 1 if page.evaluate(_IDLE) else 0
            if calm[page] == 10:
                done[page] = time.perf_counter() - started
        pages[0].wait_for_timeout(30)
    return list(done.values())


def with_a_wide_one(folder: Path) -> None:
    """The shipped checkpoints, and one of 24,579 features that is analysed on 4,000 tokens."""
    from analysis.corpus.run import AnalysisConfig, analyse  # what only waits for the app (docs/screenshots.py) needs
    from benchmarks.analysis import DEFAULT, wide_sae  # none of them
    from trainer.checkpoint import Checkpoint, Sizes, list_checkpoints, save

    for shipped in list_checkpoints(ROOT / "checkpoints").readable:
        (folder / shipped.name).symlink_to(shipped.path)
    default = Checkpoint(DEFAULT)
    lm = default.open_model()
    tokens = default.open_text(lm.tokenizer).held_out_tokens(1000)
    wide = wide_sae(default.sae, lm.layer(default.layer).z(tokens)[:, 1:].flatten(0, 1))
    save(folder / WIDE, wide, replace(default.config, sae=Sizes.of(wide)))
    analyse([folder / WIDE], AnalysisConfig(tokens=4000))


def choices(page: Page) -> dict[str, Callable[[int], object]]:
    """What one does on the Prompt page, by name; each takes the number of the round."""
    return {
        "the next feature": lambda i: page.keyboard.press("j"),
        "a token": lambda i: page.locator(".token").nth(5 + i).click(),
        "a head": lambda i: page.get_by_role("button", name=f"Pattern of head {i}").click(),
        "what is changed": lambda i: choose(page, "Change", ["the whole layer", "the feature"][i % 2]),
    }


def measure(browser: Browser, server: subprocess.Popen, address: str) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 1000}).new_page()
    page.set_default_timeout(120_000)

    def go(name: str) -> tuple[float, float]:
        return seconds(page, page.get_by_role("link", name=name, exact=True).click, name)

    print(f"{os.cpu_count()} cores, {ROUNDS} rounds, headless Chromium beside the server; seconds, median (slowest)\n")
    print("| | first chart, table or sentence | complete |\n|---|---|---|")
    row("first visit, imports included", [seconds(page, lambda: page.goto(f"{address}/tradeoffs"), "Tradeoffs")])
    for name in PAGES[1:]:
        row(f"{name}, first time", [go(name)])
    for what, context in (("new session, empty browser cache", None), ("new session, known browser", page.context)):
        values = []
        for _ in range(ROUNDS):
            fresh = (context or browser.new_context()).new_page()
            values.append(seconds(fresh, partial(fresh.goto, f"{address}/tradeoffs"), "Tradeoffs"))
            fresh.close()
        row(what, values)
    for name in PAGES:
        values = []
        for _ in range(ROUNDS):
            go(PAGES[(PAGES.index(name) + 1) % len(PAGES)])
            values.append(go(name))
        row(f"to {name}, caches warm", values)
    visit = partial(page.goto, f"{address}/features?checkpoint={WIDE}")
    row("24,579 features, first time", [seconds(page, visit, "Features")])
    steps = {
        "a token that fires": lambda i: search(page, ["the", "of", "and", "to", "in"][i]),
        "the next feature": lambda i: page.get_by_role("button", name="Next", exact=True).click(),
    }
    for name, step in steps.items():
        row(f"24,579 features, {name}", [seconds(page, partial(step, i), "Features") for i in range(ROUNDS)])
    page.goto(f"{address}/prompt")
    idle(page)
    for name, choice in choices(page).items():
        row(f"Prompt, {name}", [chosen(page, partial(choice, i)) for i in range(ROUNDS)])
    print(f"| a new prompt of 66 tokens | | {spread(prompts(page, [f'{i} {TEXT * 3}' for i in range(ROUNDS)]))} |")
    print(f"| a new prompt of 1,016 tokens | | {spread(prompts(page, [f'{i} {TEXT * 44}' for i in range(3)]))} |")
    print(f"\nThe server holds {resident(server.pid):.1f} GB.")
    sessions = [browser.new_context(viewport={"width": 1280, "height": 1000}).new_page() for _ in range(SESSIONS)]
    for session in sessions:
        session.goto(f"{address}/prompt")
        idle(session)
    taken = together(sessions, [f"{i} {i} {TEXT * 3}" for i in range(SESSIONS)])
    print(
        f"{SESSIONS} sessions send a new prompt of 66 tokens at once: complete after {min(taken):.1f} to "
        f"{max(taken):.1f} s; the server holds {resident(server.pid):.1f} GB."
    )


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen, str, Browser]]:
    """The app on a folder of checkpoints, its address, and a browser."""
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true", f"--server.port={PORT}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"ATTN_SAES_CHECKPOINTS": str(folder)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
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
            yield server, address, browser
            browser.close()
    finally:
        server.terminate()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with_a_wide_one(Path(folder))
        with served(Path(folder)) as (server, address, browser):
            measure(browser, server, address)


if __name__ == "__main__":
    main()
