"""The Prompt page through AppTest: what is listed, what is changed, and what another prompt forgets."""

import pyarrow as pa
import pytest
import torch

from analysis.prompt.continuation import continue_prompt
from analysis.prompt.intervene import Intervention, intervene
from analysis.prompt.patch import Patch, patch, patch_every_head
from analysis.prompt.run import active_features, run_prompt
from tests.helpers import listed, open_page, said
from trainer.checkpoint import Checkpoint

NAME, TEXT, OTHER = "block-l1_1", "the head reads the head", "the tail reads the tail"
PLACE = len(TEXT)  # of the last token: BOS, and one a letter


@pytest.fixture
def sae(folder):
    return Checkpoint(folder / NAME).sae


@pytest.fixture
def ran(sae, gpt2):
    return run_prompt(gpt2.layer(1), sae, TEXT)


def opened(**more):
    app = open_page("pages/prompt.py", checkpoint=NAME, prompt=TEXT, **more)
    assert not app.exception and not app.error
    return app


def drawn(app):
    """The table of next tokens."""
    assert not app.exception and not app.error
    return app.dataframe[0].value.set_index("id")


def same(app, effect):
    table = drawn(app)
    expected = effect.table(torch.tensor(table.index.tolist())).set_index("id")
    assert table["full logit change"].tolist() == pytest.approx(expected["full logit change"].tolist(), abs=1e-4)
    return bool(table["full logit change"].abs().max() > 1e-3)


def test_the_features_of_the_checkpoint_are_listed(folder, ran):
    """The page's list against the SAE applied by hand."""
    shown, expected = listed(opened(), "features"), active_features(ran, limit=40)
    assert shown["feature"].tolist() == expected["feature"].tolist()
    assert shown["activation"].tolist() == pytest.approx(expected["activation"].tolist(), rel=1e-4, abs=1e-5)


def test_a_span_of_tokens(folder, ran):
    app = opened(token="3: e", until="5: h")
    assert listed(app, "features")["feature"].tolist() == active_features(ran, None, (3, 5), 40)["feature"].tolist()


def test_ranks(folder):
    app = opened()
    for rank, column in (("direct effect on a next token", "effect"), ("DFA from a source", "from source")):
        app.selectbox(key="rank").set_value(rank).run()
        assert not app.exception and not app.error
        assert listed(app, "features")[column].abs().is_monotonic_decreasing


def test_what_was_chosen_on_another_prompt_is_forgotten(folder):
    app = opened(head="1", token="3: e", wanted="t")
    chosen = str(listed(app, "features")["feature"].iloc[-1])
    app.selectbox(key="firing").set_value(chosen).run()
    assert (app.selectbox(key="token").value, app.selectbox(key="firing").value) == ("3: e", chosen)
    app.text_area(key="prompt").set_value(TEXT + " reads").run()
    assert app.selectbox(key="token").value == "all", "also where the token is there too"
    assert app.selectbox(key="head").value == "1", "a head is the model's"
    assert app.selectbox(key="firing").value == str(listed(app, "features")["feature"].iloc[0])
    assert app.text_input(key="wanted").value == ""
    assert not {"token", "firing", "wanted"} & set(app.query_params)


def test_a_feature_is_taken_away_scaled_and_clamped(folder, ran, sae, gpt2):
    firings = active_features(ran, limit=40)
    firing = firings[firings["position"].between(2, 20)].iloc[0]
    feature, position = int(firing["feature"]), int(firing["position"])
    app = opened(firing=str(feature))
    assert f"Without feature {feature} of head {firing['head']}, after {firing['token']}: " in said(app)
    for how, kind, amount in (
        ("take away", "scale feature", 0.0),
        ("scale", "scale feature", 3.0),
        ("clamp", "clamp feature", 3.0),
    ):
        app.selectbox(key="how").set_value(how).run()
        if amount:
            app.number_input(key="amount").set_value(amount).run()
        assert same(app, intervene(gpt2.layer(1), sae, ran, Intervention(kind, feature, amount), position))


def test_a_head_is_that_of_the_feature(folder, ran, sae, gpt2):
    features = active_features(ran, limit=40)
    other = features[features["head"] != features["head"].iloc[0]].iloc[0]
    app = opened(what="all features of its head")
    for feature in (features.iloc[0], other):
        app.selectbox(key="firing").set_value(str(feature["feature"])).run()
        head = int(feature["head"])
        assert f"Without all features of head {head}, after {PLACE}: " in said(app), "the last token"
        assert same(app, intervene(gpt2.layer(1), sae, ran, Intervention("scale features of head", head)))
    app.selectbox(key="what").set_value("its head").run()
    assert f"With head {head} replaced by its reconstruction" in said(app)
    assert same(app, intervene(gpt2.layer(1), sae, ran, Intervention("head by reconstruction", head)))
    app.selectbox(key="what").set_value("the whole layer").run()
    assert same(app, intervene(gpt2.layer(1), sae, ran, Intervention("layer by reconstruction")))


def test_only_at_the_chosen_tokens(folder, ran, sae, gpt2):
    app = opened(what="all features of its head", head="2", token="3: e", until="5: h", where="the chosen tokens")
    assert "Without all features of head 2 at 3: e to 5: h, after" in said(app)
    change = Intervention("scale features of head", 2, first=3, last=5)
    assert same(app, intervene(gpt2.layer(1), sae, ran, change))


def test_the_difference_of_two_logits(folder, ran, sae, gpt2):
    app = opened(what="the whole layer", wanted="t", against="r")
    tokens = [gpt2.single_token(text) for text in "tr"]
    found = intervene(gpt2.layer(1), sae, ran, Intervention("layer by reconstruction")).logit_difference(*tokens)
    assert f"logit(t) - logit(r): {found['clean']:+.3f} as it is, {found['full']:+.3f} (full)" in said(app)
    app.text_input(key="wanted").set_value("th").run()
    assert "'th' is 2 tokens" in app.error[0].value and not app.exception


def test_another_prompt_is_patched_in(folder, ran, sae, gpt2):
    app = opened(what="its head", head="1", how="as in another prompt")
    assert "Type the prompt from which activations are taken" in said(app)
    app.text_input(key="other").set_value(OTHER).run()
    there, layer = run_prompt(gpt2.layer(1), sae, OTHER), gpt2.layer(1)
    assert same(app, patch(layer, sae, ran, there, Patch("z of head", 1)))
    app.text_input(key="wanted").set_value("t").run()
    app.text_input(key="against").set_value("r").run()
    tokens = tuple(gpt2.single_token(text) for text in "tr")
    scan = patch_every_head(layer, sae, ran, there, Patch("z of head"), tokens)
    assert f"the other prompt ({scan['other'].iloc[0]:+.3f})" in said(app)
    charts = [chart.proto.spec for chart in app.get("vega_lite_chart")]
    assert any("recovered" in spec for spec in charts)
    app.text_input(key="other").set_value(OTHER + "s").run()
    assert app.number_input(key="shift").placeholder == "1", "both end together"
    longer = run_prompt(gpt2.layer(1), sae, OTHER + "s")
    assert same(app, patch(layer, sae, ran, longer, Patch("z of head", 1, shift=1)))
    app.number_input(key="shift").set_value(500).run()
    assert not app.exception and "no span" in app.error[0].value


def test_the_model_writes_on(folder, ran, sae, gpt2):
    app = opened(what="the whole layer", **{"continue": "true"}, new="5", temperature="1", seed="3")
    texts = continue_prompt(gpt2.layer(1), sae, ran, Intervention("layer by reconstruction"), 5, 1.0, 3)
    bodies = [element.proto.body for element in app.get("html")]
    for text, words in zip(texts, ("As it is", "With the whole layer replaced"), strict=True):
        (body,) = [body for body in bodies if words in body]
        assert body.count("<span title") == len(text.ids)


def test_a_long_prompt_stays_usable(folder):
    app = open_page("pages/prompt.py", checkpoint=NAME, prompt="a head reads " * 18)
    assert not app.exception
    assert app.slider(key="from").max == len("a head reads " * 18) + 1 - 96
    app.slider(key="from").set_value(100).run()
    app.text_area(key="prompt").set_value("a head reads " * 9).run()
    assert not app.exception
    chart = next(chart for chart in app.get("vega_lite_chart") if "viridis" in chart.proto.spec)
    assert len(pa.ipc.open_stream(chart.proto.datasets[0].data.data).read_all()), "the map of the shorter prompt"
