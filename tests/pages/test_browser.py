"""A newcomer in a real browser: types a prompt on the embedded model and sees its features."""

import http.client
import re

import pandas as pd
import pytest

from tests.browser import Visitor, browse
from tests.helpers import PATIENCE


def test_without_a_browser_these_tests_are_skipped_but_not_in_ci(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no Chromium on this machine"), browse():
        pass
    monkeypatch.setenv("CI", "1")
    with pytest.raises(pytest.fail.Exception, match="CI must have a browser"), browse():
        pass


def test_from_a_token_to_the_reason_why(visitor, chromium, address):
    """Token, head, feature, source, ablation, link: on the induction prompt of the tour."""
    page = visitor.page
    visitor.open("prompt")
    page.get_by_role("button", name="Induction", exact=True).click()
    page.get_by_text("its largest source is").wait_for()
    for head in ("3", "4", "5"):
        visitor.choose("Head", head)
        visitor.addressed(head=head)
        sentence = page.get_by_text(f"of head {head} at").first
        sentence.wait_for()
    visitor.choose("Head", "4")
    visitor.choose("Token", "19: \u00b7the")
    sentence = page.get_by_text("of head 4 at 19").first
    sentence.wait_for()
    assert "its largest source is 6: \u00b7mat (induction)" in sentence.inner_text()
    visitor.choose("Change", "all features of its head")
    visitor.addressed(what="all features of its head")
    page.get_by_text("Without all features of head 4, after 19: \u00b7the: \u00b7mat 3").wait_for()
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.idle()
    link, shown = page.url, sentence.inner_text()

    fresh = Visitor(chromium, address)
    fresh.page.goto(link)
    restored = fresh.page.get_by_text("of head 4 at 19").first
    restored.wait_for()
    assert restored.inner_text() == shown, "the address restores the page"
    shares = re.compile(r"after 19: \u00b7the: \u00b7mat 3[23]\.\d% \(full\), .* 4[67]\.\d% as it is")
    fresh.page.get_by_text(shares).wait_for()
    dashboard = fresh.page.get_by_role("link", name="Its dashboard")
    dashboard.click()
    fresh.page.get_by_role("heading", name=re.compile(r"Feature \d+ of head 4")).wait_for()
    fresh.page.get_by_text("Nearest features").wait_for()
    fresh.leave()


@pytest.mark.slow
def test_two_sessions_at_once_get_their_own_answers(chromium, address):
    prompts = {"one two three four. one two three": "four", "red green blue red green": "blue"}
    visitors = [Visitor(chromium, address) for _ in prompts]
    for visitor in visitors:
        visitor.open("prompt")
    for visitor in visitors:
        visitor.page.get_by_text("its largest source is").wait_for()
    for visitor, text in zip(visitors, prompts, strict=True):
        visitor.prompt(text)
    for visitor, text in zip(visitors, prompts, strict=True):
        visitor.page.wait_for_url(f"**{text.split()[0]}*")
        visitor.choose("Change", "the whole layer")
    for visitor, following in zip(visitors, prompts.values(), strict=True):
        visitor.page.get_by_text(re.compile(rf"after \d+: \S+: \u00b7{following} \d")).wait_for()
        visitor.leave()


def test_a_deviant_feature_is_one_click_away_and_back_one_step(visitor):
    page = visitor.page
    visitor.open("heads?show=Monosemanticity&of_head=8")
    page.get_by_role("heading", name="Features of head 8 that deviate").wait_for()
    visitor.idle()
    before = visitor.shown()
    page.locator(".rows").last.locator("tbody tr[aria-selected]").first.click()
    page.get_by_role("heading", name=re.compile(r"Feature \d+ of head 8")).wait_for()
    first = visitor.shown()
    page.locator(".rows").first.locator("tbody tr[aria-selected]").nth(3).click()
    visitor.idle()
    second = visitor.shown()
    assert first[0] != second[0]
    page.get_by_test_id("stTopNav").get_by_role("link", name="Heads", exact=True).click()
    page.get_by_role("heading", name="Features of head 8 that deviate").wait_for()
    visitor.idle()
    for shown in (second, first, before):  # one step each
        page.go_back()
        assert visitor.shown() == shown


@pytest.mark.slow
def test_the_address_says_what_is_shown(visitor):
    """Streamlit leaves in the address what is no option any more, and leaves defaults out of it."""
    page = visitor.page
    visitor.open("prompt")
    page.get_by_text("of head").first.wait_for()
    visitor.choose("Token", "17: \u00b7sat")
    visitor.choose("Predict after token", "10: \u00b7ran")
    visitor.addressed(predict="10", token="17")
    page.get_by_role("button", name="Duplicate token", exact=True).click()
    visitor.addressed(prompt="Paris")
    visitor.idle()
    page.get_by_role("button", name="Induction", exact=True).click()
    page.wait_for_url(f"{visitor.address}/prompt?checkpoint=smollm2-135m-L17-batchtopk-x8-k32")
    visitor.idle()
    other = "smollm2-135m-L17-batchtopk-x4-k32"
    visitor.choose("Checkpoint", other)
    visitor.addressed(checkpoint=other)
    visitor.idle()
    page.get_by_role("link", name="Its dashboard").click()
    page.get_by_text("Nearest features").wait_for()
    visitor.idle()
    assert f"checkpoint={other}" in page.url and "feature=" in page.url
    visitor.open(f"prompt?checkpoint={other}")  # Streamlit drops from a link what the page that one leaves has too
    page.get_by_role("link", name="Its dashboard").click()
    page.get_by_text("Nearest features").wait_for()
    visitor.idle()
    assert f"checkpoint={other}" in page.url and "feature=" in page.url


@pytest.mark.slow
def test_what_is_chosen_by_hand_after_a_prompt_by_hand_is_in_the_address(visitor):
    """Streamlit forgets to write it: the spinner of the prompt pushes the boxes below aside."""
    page = visitor.page
    visitor.open("prompt")
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.prompt("one two three four. one two three")
    visitor.addressed(prompt="one")
    for name, option in (("Head", "4"), ("Token", "7: \u00b7two"), ("Rank by", "DFA from a source")):
        visitor.choose(name, option)
    visitor.addressed(prompt="one", head="4", token="7", rank="DFA")
    visitor.choose("Head", "all")
    visitor.addressed(head="", token="7")
    address = page.url
    page.reload()
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.idle()
    assert page.url == address
    assert page.get_by_role("textbox", name="Prompt").input_value() == "one two three four. one two three"
    assert page.get_by_role("combobox", name="Token", exact=True).first.input_value() == "7: \u00b7two"


@pytest.mark.slow
def test_what_fits_the_filters_is_a_file(visitor):
    page = visitor.page
    visitor.open("features?fires=any+digit")
    page.get_by_text("The features above as a file").click()
    for kind, read in (("CSV", pd.read_csv), ("JSON", pd.read_json)):
        button = page.get_by_role("button", name=re.compile(rf"^\d+ as {kind}$"))
        n = int(button.inner_text().split()[0])
        with page.expect_download() as downloaded:
            button.click()
        table = read(downloaded.value.path())
        assert len(table) == n > 10 and table["precision"].between(0, 1).all()


@pytest.mark.slow
def test_a_list_is_walked_by_mouse_and_by_keys(visitor):
    page = visitor.page
    rows = page.locator(".rows").first.locator("tbody tr[aria-selected]")

    def at(place: int) -> None:
        feature = rows.nth(place).locator("td").first.text_content()
        page.get_by_role("heading", name=re.compile(rf"Feature {feature} of head")).wait_for()
        visitor.idle()
        assert rows.nth(place).get_attribute("aria-selected") == "true"

    visitor.open("features?fires=any+digit")
    at(0)
    rows.nth(3).click()
    at(3)
    for key, place in (("j", 4), ("k", 3)):
        page.keyboard.press(key)
        at(place)
    page.locator(".rows").first.focus()
    page.keyboard.press("ArrowUp")
    at(2)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.ariaLabel") == "Fires on"
    page.get_by_role("button", name="of the token's").click()
    shares = [float(text.rstrip("%")) for text in rows.locator("td:nth-child(4)").all_text_contents()]
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[-1]
    at(rows.locator("td:first-child").all_text_contents().index(page.url.split("feature=")[1].split("&")[0]))
    page.locator(".rows").last.locator("tbody tr[aria-selected]").first.click()
    page.wait_for_function("document.querySelector('[data-testid=stMain]').scrollTop == 0")


@pytest.mark.slow
def test_markup_in_a_prompt_only_appears(visitor):
    page = visitor.page
    visitor.open("prompt")
    page.get_by_text("its largest source is").wait_for()
    visitor.prompt("<img src=x onerror=document.title='owned'> <script>document.title='owned'</script> \u202e [a](b)")
    page.wait_for_url("**onerror*")
    page.get_by_text("What each head does on this prompt").wait_for()
    visitor.idle()
    assert "owned" not in page.title()
    assert page.locator("[data-testid=stMain] img").count() == 0


def test_another_sites_name_for_this_machine_gets_no_session(address):
    port = int(address.rpartition(":")[2])
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    for name, status in (
        ("localhost", 101),
        ("127.0.0.1", 101),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
    ):
        connection = http.client.HTTPConnection("localhost", port, timeout=PATIENCE)
        host = f"{name}:{port}"
        more = {"Host": host, "Origin": f"http://{host}", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg=="}
        connection.request("GET", "/_stcore/stream", headers=upgrade | more)
        assert connection.getresponse().status == status, name
        connection.close()


@pytest.mark.parametrize("path", ["", "tradeoffs", "heads", "features", "compare", "runs"])
def test_every_page_comes_up_without_errors(visitor, path):
    visitor.open(path)
    visitor.page.get_by_role("button", name="Copy link").wait_for()
    visitor.idle()
    assert visitor.page.locator("[data-testid=stException]").count() == 0


# Mean opacity (0 to 255) of a whole thumbnail, and where the second half of two tokens a row would read by induction.
_OPACITY = """canvas => {
    const { width, height } = canvas, pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
    const at = (x, y) => pixels[4 * (y * width + x) + 3];
    const mean = (values) => values.reduce((a, b) => a + b) / values.length;
    const rows = [...Array(28).keys()].map((i) => i + 36);
    const whole = [...Array(width * height).keys()].map((i) => at(i % width, Math.floor(i / width)));
    return [mean(whole), mean(rows.map((row) => at(2 * (row - 31), 2 * row)))];
}"""


def test_thumbnails_are_drawn_and_induction_is_seen(visitor):
    """In contexts of 127 positions the token after an earlier copy is 62 back: 31 rows of two tokens."""
    visitor.open("heads?checkpoint=smollm2-135m-L17-batchtopk-x8-k32")
    opacity = {}
    for on in ("text", "repeated tokens"):
        for head in range(9):
            canvas = visitor.page.get_by_role("img", name=f"Mean attention of head {head} on {on}", exact=True)
            whole, opacity[head] = canvas.evaluate(_OPACITY)
            assert whole > 2, f"head {head} on {on} is blank"
    heads = sorted(opacity, key=opacity.__getitem__)
    assert set(heads[-3:]) == {3, 4, 5}, opacity
    assert opacity[heads[-3]] > 150 > 100 > opacity[heads[-4]], opacity


@pytest.mark.slow
def test_the_prompt_is_text_that_one_hovers_and_clicks(visitor):
    """By mouse and by keyboard: a token, a span, a head, each as the boxes below choose it, and after a reload too."""
    page = visitor.page
    visitor.open("prompt")
    token = page.locator(".token")
    token.nth(19).wait_for()
    assert token.nth(6).text_content() == " mat"
    page.get_by_role("button", name="Pattern of head 4").click()
    visitor.addressed(head="4")
    visitor.idle()
    page.get_by_text("DFA of the features that fire", exact=True).click()
    visitor.addressed(reads="DFA of the features that fire")
    visitor.idle()
    token.nth(19).hover()
    page.get_by_text(re.compile(r"19: the reads 6: mat \(")).wait_for()
    token.nth(19).click()
    visitor.addressed(token="19")
    visitor.idle()
    token.nth(5).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    visitor.addressed(token="6")
    visitor.idle()
    token.nth(8).click(modifiers=["Shift"])
    visitor.addressed(until="8")
    for again in (False, True):
        if again:
            page.reload()
        visitor.idle()
        page.locator(".token.chosen").nth(2).wait_for()
        assert page.locator(".token.chosen").all_text_contents() == [" mat", ".", " The"]
        assert page.get_by_role("button", name="Pattern of head 4").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Pattern of head 4").click()
    page.wait_for_function("!location.href.includes('head=')")
    visitor.idle()
    cells = page.get_by_test_id("stVegaLiteChart").nth(1)  # the first one is the chosen feature's
    cells.scroll_into_view_if_needed()
    cells.click(position={"x": cells.bounding_box()["width"] / 2, "y": 110})  # the row of head 4
    visitor.addressed(head="4", token="11")
    page.get_by_role("button", name="Pattern of head 4", pressed=True).wait_for()


def test_from_the_map_of_a_model_to_a_feature_of_another_layer(visitor):
    """The shipped table of the embedded model: click a cell, then the row that the finder has for an induction head."""
    page = visitor.page
    visitor.open("")
    page.get_by_role("heading", name="Find heads").wait_for()
    visitor.idle()
    chart = page.get_by_test_id("stVegaLiteChart").first
    box = chart.bounding_box()
    chart.click(position={"x": box["width"] * 0.4, "y": 200})
    page.wait_for_function("new URL(location).searchParams.get('at')?.match(/^\\d+\\.\\d$/)")
    visitor.idle()
    page.locator(".rows tbody tr[aria-selected]", has_text="17.4").click()
    visitor.addressed(at="17.4")
    page.get_by_text("Head 17.4", exact=True).wait_for()
    visitor.idle()
    link = page.url
    page.reload()
    page.get_by_text("Head 17.4", exact=True).wait_for()
    assert page.url == link
    page.get_by_role("link", name="Its features").click()
    visitor.addressed(checkpoint="smollm2-135m-L17", head="4")
    page.get_by_text("Nearest features").wait_for()
    page.get_by_test_id("stTopNav").get_by_role("link", name="Heads", exact=True).click()
    visitor.addressed(checkpoint="smollm2-135m-L17")


def test_a_circuit_from_the_tour_to_a_feature_as_target(visitor):
    """The shipped set: an example of the tour, a node by its row, its head opened, and what makes that feature fire."""
    page = visitor.page
    visitor.open("circuit")
    page.get_by_text("The target is").wait_for()
    visitor.idle()
    page.get_by_text("18.6 at the last token: it reads ' mat'").wait_for()  # the page opens as the tour does
    of_edge = page.locator("[aria-label*='edge: 16.0 at the source makes it look there: 18.6']").first
    x, y, width, height = of_edge.bounding_box().values()
    page.mouse.click(x + width / 2, y + height / 2)
    visitor.addressed(edge="16.0 at 6")
    page.get_by_text("the score above its row's mean, by what is at the key").wait_for()
    visitor.idle()
    page.locator(".rows").first.locator("tbody tr[aria-selected]", has_text="cat").click()  # of the predictions
    visitor.addressed(next="\u00b7cat")
    visitor.idle()
    page.get_by_role("button", name="Agreement", exact=True).click()
    visitor.addressed(prompt="The keys", next="are", against="is")
    page.get_by_text("Without it the target, 1.2, is below 0").wait_for()
    page.get_by_text("The target is 1.").wait_for()
    visitor.idle()
    box = page.get_by_role("combobox", name="Node", exact=True)
    assert box.input_value().startswith("26.0 feature") and box.input_value().endswith("cabinet")
    page.locator(".rows tbody tr[aria-selected]", has_text=re.compile(r"^27\.8 feature")).first.click()
    visitor.addressed(node="27.8 feature")
    visitor.idle()
    chosen, link = box.input_value(), page.url
    page.reload()
    page.get_by_text("The target is 1.").wait_for()
    visitor.idle()
    assert box.input_value() == chosen and page.url == link, "the address restores the page"
    page.get_by_role("button", name="Explain it instead").click()
    visitor.addressed(what=chosen.split(" at ")[0], node="")
    visitor.idle()
    assert page.get_by_role("combobox", name="Explain", exact=True).input_value() == chosen.split(" at ")[0]
    page.get_by_role("link", name="Its dashboard").click()
    page.get_by_role("heading", name=re.compile(r"Feature \d+ of head \d")).wait_for()
