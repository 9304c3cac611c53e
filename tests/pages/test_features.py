"""The Features page, and what other pages do with features, through AppTest."""

import pandas as pd
import pytest

from analysis.comments import Comments
from analysis.labels import Labels
from analysis.lists import Lists
from analysis.prompt.run import run_prompt
from analysis.search import Tokens
from analysis.store import Analysis
from pages.shared import strips
from tests.helpers import ANALYSED, ROOT, listed, open_page, said
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
    app = open_page(
        "pages/features.py", checkpoint="block-l1_1", head="2", order="fewest firings", feature=str(feature)
    )
    assert not app.exception
    browser = listed(app, "browser")
    assert set(browser["head"]) == {2}
    firings = analysis.features.loc[browser["feature"], "firings"]
    assert firings.is_monotonic_increasing
    assert shown_feature(app) == feature


def test_filters_narrow_the_browser(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    before = len(listed(app, "browser"))
    features = Analysis(Checkpoint(folder / "block-l1_1")).features
    role = features["role"].dropna().iloc[0]
    app.selectbox(key="role").set_value(role).run()
    assert set(features.loc[listed(app, "browser")["feature"], "role"]) == {role}
    app.text_input(key="noted").set_value("no such words").run()
    assert "No feature fits" in said(app)
    assert not app.exception
    app.text_input(key="noted").set_value("").run()
    app.selectbox(key="role").set_value("all").run()
    assert len(listed(app, "browser")) == before


def test_a_prompt_of_ones_own_is_a_filter_which_combines_with_others(folder, gpt2):
    app = open_page("pages/features.py", checkpoint="block-l1_1", mine="one two", head="2")
    checkpoint = Checkpoint(folder / "block-l1_1")
    f = run_prompt(gpt2.layer(1), checkpoint.sae, "one two").f[1:, 2]
    n = f.shape[-1]
    assert set(listed(app, "browser")["feature"]) == {2 * n + i for i in range(n) if (f[:, i] > 0).any()}
    app.text_input(key="mine").set_value("one " * 200).run()
    assert "reads at most" in said(app) and not app.exception


def test_a_search_ranks_by_the_share_of_firings_on_the_token(folder):
    analysis = Analysis(Checkpoint(folder / "block-l1_1"))
    for text in ("any function", "any content", '"e"', "/^[aeiou]$/"):
        expected = analysis.search(fires_on=Tokens.typed(text))
        app = open_page("pages/features.py", checkpoint="block-l1_1", fires=text)
        assert not app.exception
        if expected.empty:
            assert "No feature fits" in said(app)
            continue
        shown = listed(app, "browser")
        assert shown["feature"].tolist() == expected["feature"].tolist()[:200]
        assert shown["precision"].tolist() == pytest.approx(expected["precision"].tolist()[:200])
        assert shown_feature(app) == expected["feature"].iloc[0]
        found = text
    by = "share of the token's places"
    app = open_page("pages/features.py", checkpoint="block-l1_1", fires=found, order=by)
    assert listed(app, "browser")["recall"].is_monotonic_decreasing and app.selectbox(key="order").value == by
    app.selectbox(key="fires").set_value(None).run()
    assert not app.exception and app.selectbox(key="order").value == "as searched, else most firings"


def test_what_is_no_regular_expression_is_a_sentence(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1", fires="/(/")
    assert not app.exception
    assert "is no regular expression" in app.error[0].value


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
    order = listed(app, "browser")["feature"].tolist()
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
    assert listed(again, "browser")[["feature", "words"]].values.tolist() == [
        [feature, "<script>alert(1)</script> *the*"]
    ]
    assert not [m for m in again.markdown if m.allow_html]
    scripts = [element.proto.body for element in again.get("html") if "<script>" in element.proto.body]
    assert scripts == [(ROOT / "pages" / "shared" / "page.html").read_text()]


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


def test_a_feature_is_put_on_a_list_found_there_and_exported(folder):
    Lists(folder / "block-l1_1").put(5, ["mine"])
    app = open_page("pages/features.py", checkpoint="block-l1_1", feature="9")
    box = app.multiselect(key="lists_9")
    assert (box.options, box.value) == (["mine"], [])
    box.set_value(["mine"]).run()
    assert not app.exception and Lists(folder / "block-l1_1").all() == {"mine": [5, 9]}
    app.selectbox(key="list").set_value("mine").run()
    alive = Analysis(Checkpoint(folder / "block-l1_1")).search()["feature"].tolist()
    assert listed(app, "browser")["feature"].tolist() == [each for each in alive if each in (5, 9)]
    app.multiselect(key="lists_9").set_value([]).run()
    assert Lists(folder / "block-l1_1").all() == {"mine": [5]}
    assert 9 not in listed(app, "browser")["feature"].tolist()


def test_lists_that_cannot_be_read_are_a_sentence(folder):
    (folder / "block-l1_1" / "lists.sqlite").write_bytes(b"nonsense" * 100)
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    assert not app.exception and "lists.sqlite cannot be used" in app.error[0].value
    assert len(listed(app, "browser"))


def test_a_comment_has_a_name_and_can_be_removed(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1", feature="9")
    app.text_area(key="comment_9").set_value("reads ![x](http://evil.example/x)")
    app.button(key="post_9").click().run()
    assert "the name under a comment has 1 to 60 characters" in app.error[0].value
    app.text_input(key="author").set_value("Ada").run()
    app.button(key="post_9").click().run()
    (comment,) = Comments(folder / "block-l1_1").all()
    assert (comment.feature, comment.author, comment.text) == (9, "Ada", "reads ![x](http://evil.example/x)")
    assert [text.value for text in app.text if text.value.startswith("Ada, 20") and text.value.endswith(comment.text)]
    assert app.text_area(key="comment_9").value == "" and not app.error and not app.exception
    other = open_page("pages/features.py", checkpoint="block-l1_1", feature="5")
    assert "evil" not in said(other) and "evil" not in "".join(text.value for text in other.text)
    app.button(key=f"remove_{comment.id}").click().run()
    assert not Comments(folder / "block-l1_1").all() and not app.exception
    Comments(folder / "block-l1_1").add(9, "Ada", "text")
    (folder / "block-l1_1" / "comments.sqlite").write_bytes(b"nonsense" * 100)
    app.run()
    assert "comments.sqlite cannot be used" in app.error[0].value and not app.exception


def test_what_was_seen_is_one_click_away(folder):
    app = open_page("pages/features.py", checkpoint="block-l1_1")
    first, second = listed(app, "browser")["feature"][:2]
    app.button(key="go_Next").click().run()
    assert shown_feature(app) == second
    app.button(key=f"seen_{first}").click().run()
    assert shown_feature(app) == first and [b for b in app.button if b.key == f"seen_{second}"]


def test_a_link_names_its_checkpoint(folder):
    app = open_page("pages/features.py", of="batchtopk", feature="3")
    assert not app.exception and app.selectbox(key="checkpoint").value == "batchtopk"
    assert "of" not in app.query_params and app.query_params["checkpoint"] == "batchtopk"
    assert shown_feature(app) == 3
    app = open_page("pages/features.py", of="nope")
    assert "There is no checkpoint `nope`" in app.warning[0].value
