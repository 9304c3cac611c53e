"""The Compare page through AppTest: two to four checkpoints, with and without matches and analyses, and a dense one."""

import json
import shutil

import pytest

from analysis import __main__ as analysis
from analysis.match import read
from analysis.match.__main__ import main as match_main
from analysis.match.read import Match
from analysis.prompt.run import active_features, role_table, roles, run_prompt
from tests.helpers import ROOT, edit_config, edit_json, open_page, said
from trainer.checkpoint import Checkpoint

PAGE = "pages/compare.py"
PROMPT = "the head reads a token"
OPTIONS = ["--tokens=600", "--device=cpu"]
NAMES = ["block-l1_1", "block-l1_4", "dense", "batchtopk"]


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """Four checkpoints; block-l1_1 is matched with block-l1_4 and with dense, and those two blocks are analysed."""
    folder = tmp_path_factory.mktemp("compare")
    for name in NAMES:
        shutil.copytree(trained / name, folder / name)
    assert match_main([*(str(folder / name) for name in NAMES[:3]), *OPTIONS]) == 0
    options = ["--examples=2", "--quantile_examples=1"]
    assert analysis.main([*(str(folder / name) for name in NAMES[:2]), *OPTIONS, *options]) == 0
    return folder


@pytest.fixture
def folder(made, monkeypatch):
    """Those, read only, and the app pointed at them."""
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(made))
    return made


@pytest.fixture
def copy(made, show_copy):
    return show_copy(made)


def compare(*names: str, show: str = "Figures", **query):
    app = open_page(PAGE, **dict(zip("abcd", names, strict=False)), prompt=PROMPT, show=show, **query)
    assert not app.exception and not app.error
    return app


def frame(app, *columns: str):
    """The one table on the page that has these columns."""
    (table,) = [drawn.value for drawn in app.dataframe if set(columns) <= set(drawn.value)]
    return table


def commands(app) -> list[str]:
    return [code.value for code in app.code]


def run(path, lm):
    return run_prompt(lm.layer(1), Checkpoint(path).sae, PROMPT)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_figures_against_the_first(folder, n):
    app = compare(*NAMES[:n])
    figures = app.dataframe[0].value.set_index("figure")
    ordinals = ["first", "second", "third", "fourth"][:n]
    values = [column for ordinal in ordinals for column in (ordinal, f"{ordinal} ±")]
    assert list(figures) == [*values, *(f"{ordinal} - first" for ordinal in ordinals[1:])]
    for ordinal, name in zip(ordinals, NAMES, strict=False):
        stored = Checkpoint(folder / name).eval
        assert figures.loc["FVU", ordinal] == pytest.approx(stored["FVU"])
        assert figures.loc["L0", ordinal] == pytest.approx(stored["L0"])
        assert figures.loc["FVU", f"{ordinal} ±"] == pytest.approx(stored["FVU_se"])
        if ordinal != "first":
            assert figures.loc["FVU", f"{ordinal} - first"] == pytest.approx(
                stored["FVU"] - Checkpoint(folder / NAMES[0]).eval["FVU"]
            )


def test_figures_on_repeated_tokens(folder):
    repeated = compare(*NAMES, text="Repeated random tokens").dataframe[0].value.set_index("figure")
    expected = Checkpoint(folder / NAMES[3]).eval["induction"]["FVU"]
    assert repeated.loc["FVU", "fourth"] == pytest.approx(expected)


def test_the_same_prompt_in_each(folder, gpt2):
    app = compare(*NAMES, show="One prompt")
    tables = [table.value for table in app.dataframe if "reads from" in table.value]
    assert len(tables) == 4
    role = frame(app, "by attention").set_index("head")
    for table, name, ordinal in zip(tables, NAMES, ("first", "second", "third", "fourth"), strict=True):
        expected = run(folder / name, gpt2)
        assert table["feature"].tolist() == active_features(expected, limit=20)["feature"].tolist()
        assert role[f"by DFA {ordinal}"].tolist() == role_table(roles(expected))["by DFA"].tolist()
    assert sum(column.startswith("by attention") for column in role) == 1, "attention is the model's"
    token = app.selectbox(key="token").options[3]
    chosen = compare(*NAMES[:2], token=token, head="2", show="One prompt")
    for table in (drawn.value for drawn in chosen.dataframe if "reads from" in drawn.value):
        assert set(table["token"]) <= {token} and set(table["head"]) <= {2}


@pytest.mark.parametrize("swapped", [False, True])
def test_matched_features_head_by_head(folder, gpt2, swapped):
    names = NAMES[1::-1] if swapped else NAMES[:2]
    app = compare(*names, show="Features")
    match = Match(*(Checkpoint(folder / name) for name in names))
    runs = [run(folder / name, gpt2) for name in names]
    expected = read.aligned(match, *runs, None)
    shown = frame(app, "activation_a", "activation_b")
    assert len(expected) and shown[["a", "b"]].to_numpy().tolist() == expected[["a", "b"]].to_numpy().tolist()
    assert shown["activation_a"].tolist() == pytest.approx(expected["activation_a"].tolist(), rel=1e-3, abs=1e-5)
    for side in "ab":
        assert f"of {len(match.of_side(side)):,} features" in said(app)
    only = [table.value for table in app.dataframe if "nearest" in table.value]
    sides = [read.only_in(match, side, one, None) for side, one in zip("ab", runs, strict=True)]
    assert [t["feature"].tolist() for t in only] == [t["feature"].tolist() for t in sides if len(t)]


def test_the_url_restores_head_token_and_pair(folder):
    app = compare(*NAMES[:2], firing="false", show="Features")
    everything = frame(app, "activation_a")
    assert len(everything) == len(Match(Checkpoint(folder / NAMES[0]), Checkpoint(folder / NAMES[1])).pairs)
    row = everything.loc[everything["head"] == 1, ["a", "b"]].iloc[-1]
    pair = f"{row['a']} = {row['b']}"
    token = app.selectbox(key="token").options[2]
    restored = compare(*NAMES[:2], firing="false", head="1", token=token, pair=pair, show="Features")
    assert restored.selectbox(key="pair").value == pair
    assert set(frame(restored, "activation_a")["head"]) == {1}
    links = [link.proto for link in restored.get("page_link")]
    features = [row["a"], row["b"]]
    # Names without the words they share, as code: labels are Markdown.
    assert [link.label for link in links] == [
        f"Feature {feature} of `{name}`" for feature, name in zip(features, ("l1_1", "l1_4"), strict=True)
    ]
    assert [link.query_string for link in links] == [
        f"of={name}&feature={feature}" for name, feature in zip(NAMES, features, strict=False)
    ]
    # A pair that the filter leaves no room for gives way to the first that is there.
    app = compare(*NAMES[:2], firing="false", head="2", pair=pair, show="Features")
    assert app.selectbox(key="pair").value != pair


@pytest.mark.parametrize("names", [("block-l1_1", "dense"), ("dense", "block-l1_1")])
def test_a_dense_one_is_split_in_either_order(folder, gpt2, names):
    app = compare(*names, show="Features")
    match = Match(Checkpoint(folder / names[0]), Checkpoint(folder / names[1]))
    assert match.a.name == "dense"
    dense, block = (run(side.path, gpt2) for side in (match.a, match.b))
    expected = read.split_on(match, dense, None)
    assert frame(app, "covered")["feature"].tolist() == expected["feature"].tolist()
    chosen = str(expected["feature"].iloc[-1])
    app = compare(*names, dense=chosen, show="Features")
    assert app.selectbox(key="dense").value == chosen
    parts = read.parts_of(match, int(chosen), block, None)
    shown = frame(app, "b_given_a")
    assert shown["b"].tolist() == parts["b"].tolist()
    assert "by chance it would be" in said(app)
    assert len(app.get("page_link")) == 1 + len(parts)
    assert "no heads of its own" in said(compare(*names))


def test_the_first_can_be_matched_with_each_of_the_others(folder):
    for against, kind in (("second", "activation_a"), ("third", "b_given_a")):
        assert len(frame(compare(*NAMES, against=against, show="Features"), kind))
    app = compare(*NAMES, against="fourth", show="Features")
    assert "block-l1_1 and batchtopk have not been matched yet" in said(app)
    paths = [str(folder / name) for name in ("block-l1_1", "batchtopk")]
    assert commands(app)[-1] == f"python -m analysis.match {' '.join(paths)}"


def test_without_matches_and_analyses_commands_stand_there(trained, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(trained))
    paths = f"{trained / 'block-l1_1'} {trained / 'dense'}"
    app = compare("block-l1_1", "dense")
    assert "block-l1_1 has no analysis yet" in said(app)
    assert commands(app) == [f"python -m analysis {paths} --tokens=20000"]
    app = compare("block-l1_1", "dense", show="Features")
    assert "have not been matched yet" in said(app)
    assert commands(app) == [f"python -m analysis.match {paths}"]


def test_l0_after_merging_of_those_that_are_analysed(folder):
    with_curves = compare(*NAMES[:3])
    assert commands(with_curves) == [f"python -m analysis {folder / 'dense'} --tokens=20000"]
    charts = len(with_curves.get("vega_lite_chart"))
    assert "dense has no analysis yet" in said(with_curves)
    assert not commands(compare(*NAMES[:2], criterion="cosine"))
    assert charts - len(compare("dense", "batchtopk", "dense").get("vega_lite_chart")) == 2


def test_damaged_and_stale_matches_are_sentences(copy):
    pair = copy / NAMES[0] / "matches" / NAMES[1]
    (pair / "pairs.parquet").write_bytes(b"PAR1")
    app = compare(*NAMES[:2], show="Features")
    assert "pairs.parquet is damaged" in said(app) and "analysis.match" in commands(app)[-1]
    shutil.copy(copy / NAMES[0] / "sae.safetensors", copy / NAMES[1] / "sae.safetensors")
    app = compare(*NAMES[:2], show="Features")
    assert "describes other weights" in said(app) and "analysis.match" in commands(app)[-1]


def test_other_layers_are_warned_of_and_not_matched(copy):
    model = json.loads((copy / NAMES[1] / "config.json").read_text())["model"]
    edit_config(copy / NAMES[1], model={**model, "hook_layer": 0})
    app = compare(*NAMES[:2])
    assert "not trained on the same model and layer" in app.warning[0].value
    app = compare(*NAMES[:2], show="Features")
    assert "cannot be matched" in said(app) and not any("match" in command for command in commands(app))
    app = compare(*NAMES[:2], show="One prompt")
    assert any(column.startswith("by attention second") for column in frame(app, "by attention"))


def test_evaluations_of_different_length_are_warned_of(copy):
    edit_json(copy / "dense" / "eval.json", n_tokens=77)
    assert "77 tokens" in compare(*NAMES[:3]).warning[0].value
    (copy / NAMES[0] / "eval.json").unlink()
    app = compare(*NAMES[:3])
    assert "still training" in said(app)
    assert list(app.dataframe[0].value) == ["figure", "second", "second ±", "third", "third ±"], (
        "no first to compare with"
    )


def test_one_picked_twice_is_shown_once(folder):
    app = compare(NAMES[0], NAMES[1], NAMES[0])
    assert "picked twice" in said(app)
    assert list(app.dataframe[0].value) == ["figure", "first", "first ±", "second", "second ±", "second - first"]
    app = compare(NAMES[0], NAMES[0])
    assert "Both are the same checkpoint" in said(app)
    assert not compare(NAMES[0], NAMES[0], show="Features").get("page_link")


def test_names_are_only_text(copy):
    for old, new in ((NAMES[0], "<b>one</b>"), (NAMES[1], "**two** [x](y)")):
        if "/" in new:
            new = new.replace("/", "")
        (copy / old).rename(copy / new)
    names = ["<b>one<b>", "**two** [x](y)"]
    assert match_main([*(str(copy / name) for name in names), *OPTIONS]) == 0
    app = compare(*names, show="Features")
    assert not [m for m in app.markdown if m.allow_html]
    labels = [link.proto.label for link in app.get("page_link")]
    assert labels[0].endswith("of `<b>one<b>`") and labels[1].endswith("of `**two** [x](y)`")


def test_pages_hold_no_tensor_code():
    for file in (ROOT / "pages").rglob("*.py"):
        assert "torch" not in file.read_text(), file
