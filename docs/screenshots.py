"""Screenshots of the pages of a running app: `python -m docs.screenshots http://localhost:8501 OUT [page ...]`."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from benchmarks.app import idle

SIZES = {"tablet": (820, 1180), "laptop": (1280, 800), "desk": (1920, 1080)}
K32, K64 = (f"smollm2-135m-L17-batchtopk-x8-k{k}" for k in (32, 64))
SET17 = "smollm2-135m-L17-batchtopk-x4-k32"  # of the set
PAGES = {
    "model": "?at=17.4",
    "start": "start",
    "tradeoffs": "tradeoffs",
    "heads": f"heads?checkpoint={K32}",
    "heads-figures": f"heads?checkpoint={K32}&show=Figures",
    "heads-monosemanticity": "heads?show=Monosemanticity",
    "heads-redundancy": "heads?show=Redundancy+across+heads",
    "features": f"features?checkpoint={K32}&head=4&feature=2218",
    "prompt": "prompt?head=4&token=19%3A+%C2%B7the",
    "circuit": "circuit?next=mat&against=park&node=18.6+feature+1644+at+19%3A+%C2%B7the",
    "circuit-features": "circuit?prompt=The+keys+to+the+cabinet&next=are&against=is&inside=Features",
    "compare-figures": f"compare?a={K32}&b={K64}&c={SET17}",
    "compare-prompt": f"compare?a={K32}&b={K64}&show=One+prompt",
    "compare-features": f"compare?a={K32}&b={K64}&show=Features",
    "runs": "runs",
}


def main(address: str, out: Path, only: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        for scheme in ("light", "dark"):
            for size, (width, height) in SIZES.items():
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                for name, path in PAGES.items():
                    if only and name not in only:
                        continue
                    page = context.new_page()
                    page.set_default_timeout(120_000)
                    page.goto(f"{address}/{path}")
                    page.get_by_role("button", name="Copy link").wait_for()
                    idle(page)
                    # The page scrolls inside a frame of the window's height: a window that holds all of it.
                    whole = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
                    page.set_viewport_size({"width": width, "height": min(whole + 80, 6000)})
                    idle(page)
                    page.screenshot(path=out / f"{name}-{size}-{scheme}.png")
                    page.close()
                context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
