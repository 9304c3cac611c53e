"""The app under abuse: controls set by hand in any order, and addresses that somebody else wrote."""

from collections.abc import Sequence
from difflib import ndiff
from random import Random
from urllib.parse import quote

import pytest

from tests.browser import Visitor

# Of each page, what its address can hold.
PARAMETERS = {
    "prompt": "checkpoint prompt head token until from rank source next firing reads what how which where amount other "
    "shift predict wanted against continue new temperature seed",
    "": "model saes colour x y find side bound at",
    "start": "sae",
    "tradeoffs": "site text head y log runs curve",
    "runs": "run model dataset hook_layer name preset recipe k l1_coefficients block expansion_factor normalize lr "
    "total_training_steps batch_size distinct_tokens eval_tokens context_size seed device wandb",
    "circuit": "saes prompt at what next against features depth share begin by inside node group0 called0 errors curve",
    "compare": "a b c d show text criterion prompt head token against firing pair dense",
    "features": "checkpoint head role fires reads promotes mine noted near list of density order page feature kind "
    "attention whole",
    "heads": "checkpoint show text of_head judged shares",
}
PATHS = list(PARAMETERS)
HOSTILE = [
    quote("![x](http://evil.example/x.png)"),
    quote("<img src=http://evil.example/x onerror=document.title='owned'><script>1</script>"),
    quote("$x$ :red[y] [a](http://evil.example) :material/home:"),
    quote("` ``` \n\n# title\n\n| a | b |\n|---|---|"),
    *("9" * 30, "-1", "1e999", "nan", "0.5", "%FF%FE%00", "%", "", "\u202e", "all", "true", "a%00b"),
]


@pytest.mark.slow
def test_what_is_set_by_hand_survives_a_reload_and_a_way_back(chromium, address, tries, fault):
    """Every control, in any order: a reload shows the same, and so does Back, of the next page and of each entry."""
    n, backs = tries(1, len(PATHS)), 0
    for seed in range(n):
        visitor = Visitor(chromium, address)
        backs += _walk(visitor, Random(seed), PATHS[seed % len(PATHS)])
        visitor.leave()
    fault("app", "controls set by hand, in any order: reload", n, "the same address and page")
    fault("app", "controls set by hand, in any order: Back", backs, "what was shown")


@pytest.mark.slow
def test_an_address_can_bring_nothing_but_a_page_or_a_sentence(chromium, address, tries, fault):
    """Every parameter of every page, with values that somebody chose to do harm."""
    n, pages = tries(1, 42), list(PARAMETERS)
    for seed in range(n):
        random, visitor, page = Random(seed), Visitor(chromium, address), pages[seed % len(pages)]
        values = {name: random.choice(HOSTILE) for name in PARAMETERS[page].split()}
        values[random.choice(list(values))] = "x" * 10_000
        visitor.open(f"{page}?{'&'.join(f'{name}={value}' for name, value in values.items())}")
        visitor.page.get_by_role("button", name="Copy link").wait_for()
        visitor.idle()
        main = visitor.page.get_by_test_id("stMain")
        assert main.get_by_test_id("stException").count() == 0, f"{page}: {values}"
        assert main.locator("img, a[href*=evil], .katex").count() == 0, f"{page}: {values}"
        assert main.locator("script").count() == 1, f"{page}: another script than that of page.html: {values}"
        visitor.leave()
    fault("app", "addresses with markup, numbers beyond all bounds, broken bytes and 10,000 characters", n, "a page")


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
    visitor.page.get_by_test_id("stTopNav").get_by_role("link", name=other, exact=True).click()
    visitor.page.get_by_role("heading", name=other, exact=True).wait_for()
    visitor.idle()
    last = url
    for back in range(1, 9):
        visitor.page.go_back()
        if not visitor.page.url.startswith(visitor.address):  # where the visit began
            return backs
        url, *shown = visitor.shown()
        after = f"after {back} times Back, {path}: {done}"
        assert back > 1 or url == last, f"{after}: {url}, not {last}"
        if url in seen:  # else an entry of the history that was corrected before anybody saw it
            assert shown == seen[url], f"{after}: {_differ((url, *seen[url]), (url, *shown))}"
            backs += 1
    raise AssertionError(f"{path}: {done}: eight times Back and still there")


def _differ(before: Sequence, after: Sequence) -> list[str]:
    """The lines that are other ones."""
    texts = [[url, *text, *map(str, held)] for url, text, held in (before, after)]
    return [line for line in ndiff(*texts) if line[0] != " "]
