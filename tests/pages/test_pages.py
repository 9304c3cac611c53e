"""Every page through AppTest, on folders with zero, one, several, broken, dense and running checkpoints."""

import json
import os
import shutil

import pytest

from tests.helpers import OTHERS, PAGES, edit_config, listed, open_page, said, spoil
from trainer.checkpoint import Checkpoint

DRAWN = PAGES[:5]  # these have a chart without an analysis
_ALIKE = ("bricken", "gated", "jumprelu")  # saved as april or with thresholds, as batchtopk


@pytest.mark.parametrize("page", PAGES)
def test_pages_draw_without_an_exception(folder, page):
    app = open_page(page)
    assert not app.exception
    assert not app.error
    assert bool(app.get("vega_lite_chart")) == (page in DRAWN)


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_folder_says_which_command_to_run(tmp_path, monkeypatch, page):
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(tmp_path / "none"))
    app = open_page(page)
    assert not app.exception
    assert "Train one" in said(app)
    assert app.code[0].value.startswith("python -m trainer")


@pytest.mark.parametrize("page", PAGES)
def test_a_broken_checkpoint_is_named_and_the_others_stay(folder, page):
    (folder / "block-l1_1" / "config.json").write_text('{"schema')
    app = open_page(page)
    assert not app.exception
    assert "config.json is damaged" in said(app)
    assert bool(app.get("vega_lite_chart")) == (page in DRAWN)


@pytest.mark.parametrize("page", DRAWN)
def test_a_damaged_eval_is_named_and_the_others_stay(folder, page):
    (folder / "block-l1_1" / "eval.json").write_text('{"L0"')
    app = open_page(page)
    assert not app.exception
    assert "eval.json is damaged" in said(app)
    assert app.get("vega_lite_chart")


def test_damaged_metrics_are_a_sentence(folder):
    (folder / "block-l1_1" / "metrics.jsonl").write_text("nonsense\n")
    app = open_page("pages/tradeoffs.py")
    assert not app.exception
    assert "metrics.jsonl is damaged" in app.error[0].value


@pytest.mark.parametrize("page", PAGES)
def test_a_folder_of_bad_checkpoints_takes_no_page_down(folder, page):
    names = spoil(folder, folder / "topk")
    (folder / "topk" / "metrics.jsonl").unlink()
    os.mkfifo(folder / "topk" / "metrics.jsonl")
    app = open_page(page, checkpoint="block-l1_1")
    assert not app.exception
    assert f"{len(names)} unreadable" in app.expander[0].label
    sentences = [text.value for text in app.expander[0].text]
    assert (
        len(sentences) == len(names) == len([name for name in names if any(f"/{name}" in line for line in sentences)])
    )
    assert bool(app.get("vega_lite_chart")) == (page in DRAWN)


@pytest.mark.parametrize("page", PAGES[2:4])
def test_damaged_weights_are_named_and_another_checkpoint_is_shown(folder, page):
    weights = folder / "block-l1_1" / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    app = open_page(page, checkpoint="block-l1_1")
    assert not app.exception and not app.error
    assert "sae.safetensors is damaged" in said(app) and "There is no checkpoint `block-l1_1`" in said(app)


def test_a_single_checkpoint_is_enough(folder):
    for name in ("block-l1_4", "dense", *OTHERS):
        shutil.rmtree(folder / name)
    for page in PAGES:
        app = open_page(page)
        assert not app.exception and not app.error
        assert ("Both are the same checkpoint" in said(app)) == (page == "pages/compare.py")


def test_a_run_in_training_shows_its_last_batch_and_moves(folder):
    path = folder / "block-l1_4"
    (path / "eval.json").unlink()
    edit_config(path, status="training")
    table = lambda app: app.dataframe[0].value.set_index("name").loc["block-l1_4"]  # noqa: E731
    before = table(open_page("pages/tradeoffs.py"))
    assert (before["status"], before["figures"]) == ("training", "training batch")
    line = Checkpoint(path).metrics()[-1]
    assert before["L0"] == pytest.approx(line["L0"])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**line, "step": 999, "L0": 3.5}) + "\n")
    assert table(open_page("pages/tradeoffs.py"))["L0"] == 3.5
    assert "still training" in said(open_page("pages/heads.py", checkpoint="block-l1_4"))


def test_the_url_decides_what_is_shown(folder):
    app = open_page("pages/prompt.py", checkpoint="block-l1_4", prompt="it writes a token", head="2")
    assert not app.exception
    assert app.selectbox(key="checkpoint").value == "block-l1_4"
    assert app.text_area(key="prompt").value == "it writes a token"
    assert set(listed(app, "features")["head"]) == {2}


@pytest.mark.parametrize(("prompt", "message"), [("", "the prompt is empty"), ("x" * 500, "reads at most 256")])
def test_a_prompt_that_cannot_be_run_is_a_sentence(folder, prompt, message):
    app = open_page("pages/prompt.py")
    app.text_area(key="prompt").set_value(prompt).run()
    assert not app.exception
    assert message in app.error[0].value


def test_an_example_is_one_click_away(folder):
    app = open_page("pages/prompt.py")
    before = listed(app, "features")
    app.button(key="example_Indirect object").click().run()
    assert app.text_area(key="prompt").value.startswith("When John")
    assert not listed(app, "features").equals(before)


def test_compare_shows_both_and_their_difference(folder):
    app = open_page("pages/compare.py", a="block-l1_1", b="block-l1_4")
    figures = app.dataframe[0].value.set_index("figure")
    for column, name in (("first", "block-l1_1"), ("second", "block-l1_4")):
        assert figures.loc["FVU", column] == pytest.approx(Checkpoint(folder / name).eval["FVU"])
    difference = figures["second"] - figures["first"]
    assert figures.loc["L0", "second - first"] == pytest.approx(difference["L0"])


def test_compare_warns_where_the_evaluations_differ(folder):
    assert not open_page("pages/compare.py", a="block-l1_1", b="block-l1_4").warning
    file = folder / "block-l1_4" / "eval.json"
    figures = json.loads(file.read_text())
    file.write_text(json.dumps({**figures, "n_tokens": 77}))
    assert "77 tokens" in open_page("pages/compare.py", a="block-l1_1", b="block-l1_4").warning[0].value
    (folder / "block-l1_1" / "eval.json").unlink()
    app = open_page("pages/compare.py", a="block-l1_1", b="block-l1_4")
    assert not app.exception
    assert "still training" in said(app)


def test_a_dense_checkpoint_has_one_row_and_says_so(folder):
    app = open_page("pages/heads.py", checkpoint="dense")
    assert "no heads of its own" in said(app)
    app = open_page("pages/prompt.py", checkpoint="dense")
    assert not app.exception
    assert "head" not in listed(app, "features")


def test_markup_in_a_prompt_is_only_text(folder):
    app = open_page("pages/prompt.py", prompt="<script>alert(1)</script> **bold** `code`")
    assert not app.exception
    assert not [m for m in app.markdown if m.allow_html]


@pytest.mark.parametrize(
    "recipe", [pytest.param(each, marks=pytest.mark.slow if each in _ALIKE else []) for each in OTHERS]
)
def test_every_recipe_shows_on_every_page(folder, recipe):
    table = open_page("pages/tradeoffs.py").dataframe[0].value.set_index("name").loc[recipe]
    assert table["recipe"] == recipe and table["L0"] > 0
    for page in ("pages/heads.py", "pages/prompt.py"):
        app = open_page(page, checkpoint=recipe)
        assert not app.exception and not app.error and app.selectbox(key="checkpoint").value == recipe
    for show in ("Figures", "One prompt", "Features"):
        app = open_page("pages/compare.py", a=recipe, b="dense", show=show)
        assert not app.exception and not app.error
