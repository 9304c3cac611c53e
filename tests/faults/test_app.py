"""The app under abuse: controls set by hand in any order, and addresses that somebody else wrote."""

from collections.abc import Sequence
from difflib import ndiff
from random import Random

from tests.browser import Visitor

PATHS = ["prompt", "", "compare", "features", "heads", "runs"]


def test_what_is_set_by_hand_survives_a_reload_and_a_way_back(chromium, address, tries, fault):
    """Every control, in any order: a reload shows the same, and so does Back, of the next page and of each entry."""
    n, backs = tries(2, 30), 0
    for seed in range(n):
        visitor = Visitor(chromium, address)
        backs += _walk(visitor, Random(seed), PATHS[seed % len(PATHS)])
        visitor.leave()
    fault("app", "controls set by hand, in any order: reload", n, "the same address and page")
    fault("app", "controls set by hand, in any order: Back", backs, "what was shown")


def _walk(visitor: Visitor, random: Random, path: str) -> int:
    """Set five controls, reload, go to another page and back; how often Back came to what had been shown before."""
    visitor.open(path)
    (url, *shown), done = visitor.shown(), []
    seen, backs = {url: shown}, 0
    for _ in range(5):
        done.append(visitor.change(random))
        url, *shown = visitor.shown()
        seen[url] = shown
    visitor.page.reload()
    now = visitor.shown()
    assert now == (url, *shown), f"after a reload, {path}: {done}: {_differ((url, *shown), now)}"
    other = "Heads" if path != "heads" else "Prompt"
    visitor.page.get_by_role("link", name=other, exact=True).click()
    visitor.page.get_by_role("heading", name=other, exact=True).wait_for()
    visitor.idle()
    for back in range(1, 5):
        visitor.page.go_back()
        if not visitor.page.url.startswith(visitor.address):  # where the visit began
            break
        url, *shown = visitor.shown()
        if url in seen:  # else an entry of the history in between, which was corrected before anybody saw it
            assert shown == seen[url], (
                f"after {back} times Back, {path}: {done}: {_differ((url, *seen[url]), (url, *shown))}"
            )
            backs += 1
    return backs


def _differ(before: Sequence, after: Sequence) -> list[str]:
    """The lines that are other ones."""
    texts = [[url, *text, *map(str, held)] for url, text, held in (before, after)]
    return [line for line in ndiff(*texts) if line[0] != " "]
