"""The Features page, and what other pages do with features, through AppTest."""

import pandas as pd
import pyarrow as pa
import pytest

from analysis.labels import Labels
from analysis.store import Analysis
from pages.shared import strips
from tests.helpers import ANALYSED, open_page, said
from trainer.checkpoint import Checkpoint


@pytest.fixture
def folder(analysed, show_copy):
    return show_copy(analysed)


def shown_feature(app) -> int:
    box = app.number_input(key="feature")
    return int(box.placeholder if box.value is None else box.value)


@pytest.mark.parametrize("name", ANALYSED)
def test_the_dashboard_of_the_most_frequent_feature(folder, name):
    app = open_page("pages/features.py", checkpoint=name)
    assert not app.exception and not app.error
    analysis = Analysis(Checkpoint(folder / name))
    first = int(analysis.search()["feature"].iloc[0])
    assert shown_feature(app) == first
    row = analysis.feature(first)
    assert row["description"] in [text.value for text in app.text]
    assert app.metric[0].value == f"{row['density']:.3%}"
    strips = [element.proto.body for element in app.get("html")]
    tops = (analysis.examples(first)["kind"] == "top").sum()
    assert len([s for s in strips if "DFA" in s]) == tops
    assert ("belongs to no one head" in said(app)) == (name == "dense")


def test_the_address_restores_filters_and_feature(folder):
    analysis = Analysis(Checkpoint(folder / "block-l1_1"))
    feature = int(analysis.search(head=2)["feature"].iloc[1])
    app = open_page("pages/features.py", checkpoint="block-l1_1", head="2", order="rarest first", feature=str(feature))
    assert not app.exception
    browser = app.dataframe[0].value
    assert set(browser["head"]) == {2}
    firings = analysis.features.loc[browser["feature"], "firings"]
    assert firings.is_monotonic_increasing
    assert shown_feature(app) == feature


def test_filters_narrow_the_browser(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    before = len(app.dataframe[0].value)
    role = app.dataframe[0].value["role"].dropna().iloc[0]
    app.selectbox(key="role").set_value(role).run()
    assert set(app.dataframe[0].value["role"]) == {role}
    app.text_input(key="fires").set_value("no such token").run()
    assert "No feature fits" in said(app)
    assert not app.exception
    app.text_input(key="fires").set_value("").run()
    app.selectbox(key="role").set_value("all").run()
    assert len(app.dataframe[0].value) == before


def test_a_feature_of_a_larger_checkpoint_gives_way(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    app.session_state["feature"], app.session_state["page"] = 10**6, 99  # as they were there
    app.run()
    assert not app.exception
    assert shown_feature(app) == int(Analysis(Checkpoint(folder / "block-l1_1")).search()["feature"].iloc[0])


def test_a_checkpoint_that_is_not_there_is_named(folder):
    app = open_page("pages/features.py", checkpoint="nope", feature="1")
    assert "There is no checkpoint `nope`" in app.warning[0].value and not app.exception


def test_from_a_feature_that_is_filtered_away_next_is_the_first(folder):
    analysis = Analysis(Checkpoint(folder / "block-l1_1"))
    app = open_page("pages/features.py", checkpoint="block-l1_1", head="2")
    away = int(analysis.search(head=1)["feature"].iloc[0])
    app.number_input(key="feature").set_value(away).run()
    assert shown_feature(app) == away
    assert app.button(key="go_Previous").disabled
    app.button(key="go_Next").click().run()
    assert shown_feature(app) == int(analysis.search(head=2)["feature"].iloc[0])


def test_a_strip_holds_the_source_that_matters_most():
    assert strips.around(100, 99, 200) == (60, 112)
    assert strips.around(100, 20, 200) == (17, 112)
    assert strips.around(5, 0, 8) == (0, 7)


def test_previous_next_and_the_next_head(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1", head="1")
    order = app.dataframe[0].value["feature"].tolist()
    app.button(key="go_Next").click().run()
    assert shown_feature(app) == order[1]
    app.button(key="go_Previous").click().run()
    assert shown_feature(app) == order[0]
    app.button(key="go_Next head").click().run()
    features = Analysis(Checkpoint(folder / "block-l1_1")).features
    assert features.loc[shown_feature(app), "head"] == 2
    app.button(key="go_Previous head").click().run()
    assert features.loc[shown_feature(app), "head"] == 1


def test_labels_are_written_found_and_harmless(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    feature = shown_feature(app)
    app.text_input(key=f"text_{feature}").set_value("<script>alert(1)</script> *the*")
    next(b for b in app.button if b.label == "Save").click().run()
    assert not app.exception
    assert Labels(folder / "block-l1_1").get(feature).label == "<script>alert(1)</script> *the*"
    again = open_page("pages/features.py", checkpoint="block-l1_1", noted="ALERT(1)")
    assert again.dataframe[0].value["feature"].tolist() == [feature]
    assert not [m for m in again.markdown if m.allow_html]
    assert not any("<script>" in element.proto.body for element in again.get("html"))


def test_a_label_changed_elsewhere_is_not_overwritten(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    feature = shown_feature(app)
    Labels(folder / "block-l1_1").put(feature, "theirs", "", seen=0.0)
    app.text_input(key=f"text_{feature}").set_value("mine")
    next(b for b in app.button if b.label == "Save").click().run()
    assert "changed in another session" in app.error[0].value
    assert Labels(folder / "block-l1_1").get(feature).label == "theirs"


@pytest.mark.parametrize("page", ["pages/features.py", "pages/heads.py"])
def test_without_an_analysis_the_command_is_there(folder, page):
    app = open_page(page, checkpoint="topk")
    assert not app.exception
    assert "has no analysis yet" in said(app)
    assert app.code[0].value.startswith("python -m analysis ")


def test_a_damaged_analysis_is_a_sentence(folder):
    (folder / "block-l1_1" / "analysis" / "meta.json").write_text("{")
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    assert not app.exception
    assert "damaged" in said(app)
    (folder / "dense" / "analysis" / "examples.parquet").write_bytes(b"PAR1")
    app = open_page("pages/features.py", checkpoint="dense")
    assert not app.exception
    assert "examples.parquet is damaged" in said(app)


@pytest.mark.parametrize(
    ("page", "table", "column"), [("features", "features", "role"), ("heads", "heads", "role_dfa")]
)
def test_a_role_is_a_slot_and_no_markdown(folder, page, table, column):
    file = folder / "batchtopk" / "analysis" / f"{table}.parquet"
    changed = pd.read_parquet(file).assign(**{column: "![x](http://evil.example/x)"})
    changed.to_parquet(file)
    app = open_page(f"pages/{page}.py", checkpoint="batchtopk")
    assert not app.exception
    assert f"column {column} has what is no source slot" in said(app)


def test_a_feature_that_never_fires_says_so(folder):
    file = folder / "batchtopk" / "analysis" / "features.parquet"
    table = pd.read_parquet(file)
    table.loc[7, "firings"] = 0
    table.to_parquet(file)
    app = open_page("pages/features.py", checkpoint="batchtopk", feature="7")
    assert not app.exception
    assert "does not fire on the tokens analysed" in said(app)


def test_the_prompt_page_links_ranks_and_ablates(folder):
    app = open_page("pages/prompt.py", checkpoint="block-l1_1", prompt="the head reads the head")
    assert not app.exception
    assert len(app.dataframe) >= 3
    ablation = app.dataframe[1].value
    firing = app.dataframe[0].value
    firing = firing[firing["position"].between(2, 20)].iloc[0]
    app.selectbox(key="firing").set_value(f"{firing['feature']}@{firing['position']}").run()
    assert f"After {firing['token']}: " in said(app), "the next token is that of where the feature fires"
    app.selectbox(key="ablate").set_value("all features of a head").run()
    assert "After 23: " in said(app), "a head's is that of the last token"
    app.selectbox(key="ablate").set_value("the feature chosen above").run()
    assert {"probability", "direct logit change", "full logit change"} <= set(ablation.columns)
    for rank, column in (("direct effect on a next token", "effect"), ("DFA from a source", "from source")):
        app.selectbox(key="rank").set_value(rank).run()
        assert not app.exception and not app.error
        assert app.dataframe[0].value[column].abs().is_monotonic_decreasing
    for what in ("all features of a head", "a head, by its reconstruction", "the whole layer, by its reconstruction"):
        app.selectbox(key="ablate").set_value(what).run()
        assert not app.exception and not app.error


def test_a_span_on_the_prompt_page(folder):
    app = open_page("pages/prompt.py", checkpoint="block-l1_1", prompt="the head reads", token="3: e", until="5: h")
    assert not app.exception
    assert set(app.dataframe[0].value["position"]) <= {3, 4, 5}


def test_a_long_prompt_stays_usable(folder):
    app = open_page("pages/prompt.py", checkpoint="block-l1_1", prompt="a head reads " * 18)
    assert not app.exception
    assert app.slider(key="from").max == len("a head reads " * 18) + 1 - 96
    app.slider(key="from").set_value(100).run()
    app.text_area(key="prompt").set_value("a head reads " * 9).run()
    assert not app.exception
    (chart, *_) = app.get("vega_lite_chart")
    assert len(pa.ipc.open_stream(chart.proto.datasets[0].data.data).read_all()), "the map of the shorter prompt"
