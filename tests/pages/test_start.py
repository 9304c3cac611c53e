"""The Start page: what it says, where its links lead, and that it says something where there is nothing to show."""

from urllib.parse import parse_qsl

import pandas as pd
import pytest

from analysis.store import Analysis
from pages.shared.pick import EXAMPLES
from tests.helpers import ANALYSED, open_page, said
from trainer.checkpoint import Checkpoint

PAGE = "pages/start.py"


@pytest.fixture
def folder(analysed, show_copy):
    return show_copy(analysed)


def links(app, page: str) -> list[dict[str, str]]:
    """What is in the addresses of all links to a page."""
    return [dict(parse_qsl(link.proto.query_string)) for link in app.get("page_link") if link.proto.page == page]


@pytest.mark.parametrize("name", ANALYSED)
def test_the_example_leads_where_the_analysis_says(folder, name):
    if name != "dense":  # of the tiny model none is
        file = folder / name / "analysis" / "features.parquet"
        pd.read_parquet(file).assign(role="induction").to_parquet(file)
    app = open_page(PAGE, sae=name)
    assert not app.exception and not app.error
    checkpoint = Checkpoint(folder / name)
    analysis = Analysis(checkpoint)
    head = int(analysis.heads["repeated_attention_induction"].argmax())
    (prompt,) = links(app, "prompt")
    assert prompt["prompt"] == EXAMPLES["Induction"][0] and prompt["head"] == str(head)
    chosen = open_page("pages/prompt.py", **prompt)
    assert not chosen.exception
    assert chosen.selectbox(key="head").value == ("all" if checkpoint.is_dense else str(head))
    assert links(app, "heads") == [{"checkpoint": name}]
    *cards, feature = links(app, "features")
    if "feature" in feature:
        row = analysis.feature(int(feature["feature"]))
        assert (row["head"], row["role"]) == (head, "induction")
        rest = analysis.features[analysis.features["head"] == head]
        assert row["firings"] == rest.loc[rest["role"] == "induction", "firings"].max()
    else:
        cards.append(feature)
        assert "there is none" in said(app)
    assert cards == [{"checkpoint": name, "head": str(head)} for head in range(checkpoint.n_heads)]


def test_a_head_says_what_it_reads_and_how_surely(folder):
    file = folder / "block-l1_1" / "analysis" / "heads.parquet"
    changed = {
        "role_dfa": ["induction", "sentence_start", "previous", None],
        "dfa_induction": 0.81, "dfa_sentence_start": 0.4, "dfa_previous": 0.3,
        "mono_unclassified": [False, False, True, False], "mono_near_tie": [False, True, True, False],
    }  # fmt: skip
    pd.read_parquet(file).assign(**changed).to_parquet(file)
    captions = [caption.value for caption in open_page(PAGE, sae="block-l1_1").caption]
    assert captions[1:5] == [
        "induction 81%", "sentence start 40%, near-tie", "previous 30%, unclassified", "no feature fires"
    ]  # fmt: skip


def test_a_description_is_text(folder):
    file = folder / "block-l1_1" / "analysis" / "features.parquet"
    pd.read_parquet(file).assign(description="<b>made</b>", role="induction").to_parquet(file)
    bodies = [element.proto.body for element in open_page(PAGE, sae="block-l1_1").get("html")]
    assert [body for body in bodies if "&lt;b&gt;made" in body] and not [body for body in bodies if "<b>made" in body]


@pytest.mark.parametrize("name", ANALYSED)
def test_it_says_what_the_checkpoint_is(folder, name):
    checkpoint = Checkpoint(folder / name)
    text = said(open_page(PAGE, sae=name))
    assert f"layer 1: 4 heads of 8 dimensions. The SAE (recipe `{checkpoint.recipe}`)" in text
    assert f"{checkpoint.config.sae.d_sae:,} features" in text
    assert ("shared by all heads (dense)" in text) == checkpoint.is_dense
    assert f"L0 is {checkpoint.eval['L0']:.1f} and FVU {checkpoint.eval['FVU']:.3f}" in text
    (folder / name / "eval.json").unlink()
    assert "no held-out figures yet" in said(open_page(PAGE, sae=name))


def test_without_an_analysis_it_claims_no_head_and_no_feature(folder):
    app = open_page(PAGE, sae="topk")
    assert not app.exception
    assert app.code[0].value.startswith("python -m analysis ")
    assert not links(app, "features") and "attends most" not in said(app)
    assert [link.get("head") for link in links(app, "prompt")] == ["0", "1", "2", "3", None]


def test_the_words_are_there_where_nothing_else_is(folder, tmp_path, monkeypatch):
    (folder / "block-l1_1" / "analysis" / "heads.parquet").write_bytes(b"PAR1")
    app = open_page(PAGE, sae="block-l1_1")
    assert "heads.parquet is damaged" in said(app) and "**FVU**" in said(app)
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(tmp_path / "none"))
    app = open_page(PAGE)
    assert "Train one" in said(app) and "**FVU**" in said(app)
