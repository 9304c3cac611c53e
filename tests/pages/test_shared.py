"""What all pages share: a tick that chooses, columns by field name, errors as sentences, what a cache notices."""

import os
import re

import pandas as pd
import pytest

from pages.sections.compared import short_names
from pages.shared import columns, live, page, pick
from tests.helpers import open_page, said
from trainer.checkpoint import Checkpoint, CheckpointError


def test_a_tick_on_a_row_chooses_its_value(monkeypatch):
    state = {"table": {"selection": {"rows": [1]}}, "feature": 3}
    monkeypatch.setattr(pick.st, "session_state", state)
    table = pick.pick_row("table", "feature", [3, 7])
    assert (table["key"], table["selection_mode"]) == ("table", "single-row")
    table["on_select"]()
    assert state["feature"] == 7
    state["table"]["selection"]["rows"] = []
    table["on_select"]()
    assert state["feature"] == 7, "an untick chooses nothing"


def test_a_table_draws_its_columns_by_their_field_unless_it_says_otherwise(monkeypatch):
    drawn = {}
    monkeypatch.setattr(columns.st, "dataframe", lambda frame, **options: drawn.update(options))
    frame = pd.DataFrame({name: [1] for name in ("head", "cosine", "role_dfa", "mine", "activation")})
    columns.draw_table(
        frame, {"cosine": {"help": "another"}, "head": None, "mine": "title", "activation": 60}, height=9
    )
    config = drawn["column_config"]
    assert drawn["height"] == 9 and set(config) == set(frame)
    assert config["head"] is None and config["mine"] == {"label": "title"} and config["role_dfa"] == {"label": "DFA"}
    assert config["cosine"] == {**columns.COLUMNS["cosine"], "help": "another"}
    assert config["activation"] == {**columns.COLUMNS["activation"], "width": 60}
    assert columns.COLUMNS["cosine"]["help"] != "another", "another table has the usual one"


def test_what_is_cached_of_a_checkpoint_is_read_again_once_a_file_of_it_changes(folder):
    checkpoint = Checkpoint(folder / "topk")
    versions = {live.version(checkpoint)}
    for name in ("analysis/meta.json", "matches/dense/meta.json", "matches/gated/meta.json", "sae.safetensors"):
        file = checkpoint.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1, 1))
        versions.add(live.version(checkpoint))
    assert len(versions) == 5 == len({*versions, live.version(Checkpoint(folder / "topk"))})
    assert live.version(checkpoint) != live.version(Checkpoint(folder / "gated"))


def test_an_error_says_its_reason_and_the_command_that_mends_it(monkeypatch):
    shown = []
    for kind in ("text", "code"):
        monkeypatch.setattr(page.st, kind, lambda text, **options: shown.append(text))
    file = page.ROOT / "checkpoints" / "a" / "b"
    page.hint(CheckpointError(f"{file} is missing", f"python -m analysis {file}"), "This writes it")
    assert shown == ["checkpoints/a/b is missing. This writes it:", "python -m analysis checkpoints/a/b"]
    page.hint(CheckpointError("it is damaged"), "This writes it")
    assert shown[2:] == ["it is damaged."]


def test_what_nobody_foresaw_keeps_its_traceback():
    with pytest.raises(KeyError), page.sentences():
        raise KeyError("a bug")
    with pytest.raises(ValueError, match="a bug"), page.sentences():  # only CheckpointError is foreseen by default
        raise ValueError("a bug")


def test_a_choice_that_is_not_there_gives_way(folder):
    for head, shown in (("2", "2"), ("77", "all")):  # as of another model
        app = open_page("pages/prompt.py", head=head)
        assert not app.exception and app.selectbox(key="head").value == shown
    assert "There is no checkpoint `77`" in said(open_page("pages/heads.py", checkpoint="77"))


@pytest.mark.parametrize("page", ["heads", "compare", "tradeoffs"])
def test_an_address_that_leaves_a_choice_empty_means_the_default(folder, page):
    assert not open_page(f"pages/{page}.py", show="", text="", y="", judged="").exception


@pytest.mark.parametrize("value", ["1e999", "-inf", "nan", "9" * 30, "-1"])
def test_a_number_of_an_address_may_be_beyond_all_bounds(folder, value):
    app = open_page("pages/runs.py", hook_layer=value, lr=value, seed=value)
    assert not app.exception and len(app.number_input) == 9


@pytest.mark.parametrize(("page", "key"), [("heads", "checkpoint"), ("runs", "run")])
def test_that_a_checkpoint_is_not_there_is_said_until_another_is_picked(folder, page, key):
    app = open_page(f"pages/{page}.py", **{key: "nothere"})
    for _ in range(2):
        assert "There is no checkpoint `nothere`" in said(app)
        app.query_params[key] = app.selectbox(key=key).value  # as the page writes it
        app.run()
    other = next(name for name in app.selectbox(key=key).options if name != app.selectbox(key=key).value)
    assert "nothere" not in said(app.selectbox(key=key).select(other).run())


def test_short_names_are_told_apart():
    assert short_names(["m-L1-topk-k8", "m-L1-topk-k16", "m-L1-april-l1_2"]) == ["topk-k8", "topk-k16", "april-l1_2"]
    assert short_names(["m-L1", "m-L1-topk"]) == ["L1", "L1-topk"], "none is left without a name"
    assert short_names(["alone-k8"]) == ["alone-k8"]


@pytest.mark.parametrize(
    "text",
    [
        "![x](http://a.b/c)",
        "$x$ :red[y] :material/home: :smile:",
        "`",
        "``a`",
        "a\n\n# b",
        "<img src=x>",
        "",
        "http://a.b",
    ],
)
def test_foreign_text_is_one_span_of_code_in_markdown(text):
    span = page.plain(text)
    fence = re.match("`+", span)[0]
    inside = span.removeprefix(fence).removesuffix(fence)
    assert inside.split() == text.split() and "\n" not in span
    assert len(fence) not in map(len, re.findall("`+", inside)), "ends early"
    assert "`" not in (inside[0], inside[-1]), "a longer fence"


def test_an_address_cannot_bring_an_image():
    app = open_page("pages/features.py", checkpoint="![x](http://a.b/c)")
    assert "`![x](http://a.b/c)`" in app.warning[0].value and not app.exception
