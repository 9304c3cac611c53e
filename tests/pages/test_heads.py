"""What the Heads page says of an analysis, through AppTest."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from analysis.attribution import SLOTS
from analysis.labels import Labels
from analysis.store import Analysis
from pages.charts.heads import slot_map
from tests.helpers import ANALYSED, listed, open_page, said
from trainer.checkpoint import Checkpoint


@pytest.fixture
def folder(analysed, show_copy):
    return show_copy(analysed)


def small(app) -> list[str]:
    """Texts in small letters, without their style."""
    bodies = [element.proto.body for element in app.get("html")]
    return [body.removesuffix("</div>").partition(">")[2] for body in bodies if body.startswith("<div")]


def linked(app) -> list[tuple[str, str, str]]:
    """Of the features on the cards: id, where the link goes, and share."""
    links = [link.proto for link in app.get("page_link")]
    found = [(re.fullmatch(r":small\[:blue\[(\d+)\] (\d+%)\]", link.label), link) for link in links]
    return [(match[1], f"{link.page}?{link.query_string}", match[2]) for match, link in found if match]


def drawn(app) -> list[dict[str, tuple[int, bytes]]]:
    """The thumbnails of every card: size and values by what they are called."""
    cards = [json.loads(of.proto.json)["pictures"] for of in app.get("bidi_component") if "-pattern_" in of.proto.id]
    return [
        {each["label"]: (each["picture"]["size"], base64.b64decode(each["picture"]["values"])) for each in card}
        for card in cards
    ]


def change(folder, name: str, table: str, **columns) -> None:
    file = folder / name / "analysis" / f"{table}.parquet"
    pd.read_parquet(file).assign(**columns).to_parquet(file)


@pytest.mark.parametrize("name", ANALYSED)
@pytest.mark.parametrize("judged", ["", "repeated_"])
def test_every_head_has_a_card(folder, name, judged):
    app = open_page("pages/heads.py", checkpoint=name, judged="Repeated random tokens" if judged else "Text")
    assert not app.exception and not app.error
    heads = Analysis(Checkpoint(folder / name)).heads
    assert len(app.get("vega_lite_chart")) == 2
    marks = [element.value for element in app.markdown]
    badges = []
    for head in heads.itertuples():
        assert f"**Head {head.head}**" in marks
        for score in (
            f"Induction]]  \n**{head.repeated_attention_induction:.0%}**",
            f"Previous]]  \n**{head.repeated_attention_previous:.0%}**",
            f"Copying]]  \n**{head.copying:.2f} ± {head.copying_se:.2f}**",
        ):
            assert [mark for mark in marks if mark.endswith(score)]
        verdict, _, why = getattr(head, f"{judged}mono_verdict").partition(": ")
        badges += [verdict] + ["near-tie"] * getattr(head, f"{judged}mono_near_tie")
        why = why.replace("`", "")
        assert [text for text in small(app) if text.startswith(why[0].upper() + why[1:])], why
    assert [mark.split("[")[1].rstrip("]") for mark in marks if "-badge[" in mark] == badges
    assert app.dataframe[0].value["role_dfa"].tolist() == heads["role_dfa"].tolist()


@pytest.mark.parametrize("name", ANALYSED)
def test_a_card_links_the_most_frequent_features_of_its_head(folder, name):
    analysis = Analysis(Checkpoint(folder / name))
    app = open_page("pages/heads.py", checkpoint=name)
    expected, share = [], []
    for _, features in analysis.features.groupby("head"):
        features = features[features["firings"] > 0]
        first = features.sort_values("firings", ascending=False, kind="stable")[:3]
        expected += [(str(feature), f"features?of={name}&feature={feature}") for feature in first["feature"]]
        share += [f"{n / features['firings'].sum():.0%}" for n in first["firings"]]
    assert linked(app) == [(*link, part) for link, part in zip(expected, share, strict=True)]


@pytest.mark.parametrize("name", ANALYSED)
def test_a_card_has_the_patterns_of_its_head(folder, name):
    analysis = Analysis(Checkpoint(folder / name))
    app = open_page("pages/heads.py", checkpoint=name)
    on_text, on_repeated = analysis.patterns["text"], analysis.patterns["repeated"]
    assert drawn(app) == [
        {f"Mean attention of head {head} on text": text, f"Mean attention of head {head} on repeated tokens": repeated}
        for head, (text, repeated) in enumerate(zip(on_text, on_repeated, strict=True))
    ]
    (explained,) = [element.value for element in app.caption if "Thumbnails" in element.value]
    n = analysis.meta["n_tokens"] // 31
    assert f"On text: {n} contexts, of each the first 32 positions" in explained
    assert f"{4096 // 31} contexts as a whole, a row or column is a token" in explained


def test_where_tokens_share_a_row_it_is_said(folder):
    file = folder / "dense" / "analysis" / "meta.json"
    meta = json.loads(file.read_text())
    meta["patterns"]["repeated"]["step"] = 17
    file.write_text(json.dumps(meta))
    assert "a row or column is 17 neighbouring tokens" in said(open_page("pages/heads.py", checkpoint="dense"))


def test_an_analysis_older_than_patterns_has_no_thumbnails(folder):
    file = folder / "dense" / "analysis" / "meta.json"
    file.write_text(json.dumps({key: of for key, of in json.loads(file.read_text()).items() if key != "patterns"}))
    (folder / "dense" / "analysis" / "patterns.parquet").unlink()
    app = open_page("pages/heads.py", checkpoint="dense")
    assert not app.exception and not app.error and not drawn(app)
    assert said(app).count("older than thumbnails of patterns") == 1 and "Thumbnails:" not in said(app)
    assert linked(app)


def test_damaged_patterns_are_a_sentence_and_the_cards_stay(folder):
    (folder / "dense" / "analysis" / "patterns.parquet").write_bytes(b"PAR1")
    app = open_page("pages/heads.py", checkpoint="dense")
    assert not app.exception and not drawn(app)
    assert "patterns.parquet is damaged" in app.error[0].value and len(app.error) == 1
    assert linked(app)


def test_a_label_takes_the_place_of_a_description_and_neither_is_markup(folder):
    change(folder, "block-l1_1", "features", description="<b>made</b>")
    change(folder, "block-l1_1", "heads", mono_verdict="![x](http://evil.example) <i>")
    first, second = [int(feature) for feature, _, _ in linked(open_page("pages/heads.py", checkpoint="block-l1_1"))[:2]]
    labels = Labels(folder / "block-l1_1")
    labels.put(first, "*mine* <b>", "", seen=0.0)
    labels.put(second, "", "only a note", seen=0.0)
    app = open_page("pages/heads.py", checkpoint="block-l1_1")
    assert not app.exception
    texts = small(app)
    assert texts[:2] == ["*mine* &lt;b&gt;", "&lt;b&gt;made&lt;/b&gt;"]
    assert "![x](http://evil.example) &lt;i&gt;" in " ".join(texts) and "evil" not in said(app)


def test_damaged_labels_are_a_sentence_and_the_cards_stay(folder):
    (folder / "block-l1_1" / "labels.sqlite").write_text("no database")
    app = open_page("pages/heads.py", checkpoint="block-l1_1")
    assert not app.exception
    assert "labels.sqlite cannot be used" in app.error[0].value
    assert linked(app)


def test_where_a_head_looks_is_said_if_its_features_read_another_slot(folder):
    roles = {"role_attention_besides_bos": "previous", "role_dfa": ["self", "previous", "self", None]}
    change(folder, "block-l1_1", "heads", **roles, agree=[False, True, False, False])
    texts = small(open_page("pages/heads.py", checkpoint="block-l1_1"))
    assert len([text for text in texts if text.endswith("Besides BOS it looks mostly at previous.")]) == 2


@pytest.mark.parametrize("measure", ["dfa", "repeated_attention"])
def test_the_map_has_every_share(folder, measure):
    heads = Analysis(Checkpoint(folder / "dense")).heads
    shown = slot_map(heads, measure, "").data
    assert len(shown) == len(heads) * len(SLOTS)
    for head, shares in shown.groupby("head"):
        expected = [100 * heads.loc[head, f"{measure}_{slot}"] for slot in SLOTS]
        assert shares["share"].tolist() == pytest.approx(expected)


def test_the_address_says_of_what_the_shares_are(folder):
    specs = [
        [chart.proto.spec for chart in open_page("pages/heads.py", checkpoint="dense", **shares).get("vega_lite_chart")]
        for shares in ({}, {"shares": "Attention"}, {"shares": "nothing"})
    ]
    assert specs[0] == specs[2] and specs[0] != specs[1]


def test_without_an_analysis_the_overview_shows_the_figures(folder):
    app = open_page("pages/heads.py", checkpoint="topk")
    assert "has no analysis yet" in said(app) and app.metric[0].label == "L0"
    app = open_page("pages/heads.py", checkpoint="topk", show="Monosemanticity")
    assert "has no analysis yet" in said(app) and not app.metric


@pytest.mark.parametrize("name", ANALYSED)
def test_deviants_are_listed_and_linked(folder, name):
    app = open_page("pages/heads.py", checkpoint=name, show="Monosemanticity")
    assert not app.exception and not app.error
    assert app.get("vega_lite_chart")
    heads = Analysis(Checkpoint(folder / name)).heads
    sheet = listed(app, "sheet")
    assert pd.to_numeric(sheet["mono_share"]).tolist() == pytest.approx(heads["mono_share"].tolist(), nan_ok=True)
    assert sheet["deviants"].tolist() == [len(d) for d in heads["mono_deviants"]]
    assert heads["mono_verdict"][0] in [text.value for text in app.text]
    head = int(np.argmax(sheet["deviants"]))
    if sheet["deviants"][head]:
        app = open_page("pages/heads.py", checkpoint=name, show="Monosemanticity", of_head=str(head))
        assert listed(app, "deviants")["feature"].tolist() == list(heads["mono_deviants"][head])


@pytest.mark.parametrize("name", ANALYSED)
def test_redundancy_is_drawn(folder, name):
    app = open_page("pages/heads.py", checkpoint=name, show="Redundancy across heads")
    assert not app.exception and not app.error
    assert len(app.get("vega_lite_chart")) == 2
    pairs = Analysis(Checkpoint(folder / name)).table("pairs", filters=[("across", "==", True)])
    rows = listed(app, "pairs")
    assert len(rows) == min(200, len(pairs) // 2) and (rows["feature"] < rows["other"]).all()
    if len(rows):
        assert rows["both"].tolist() == rows[["jaccard", "cosine"]].min(axis=1).tolist()


def test_the_pairs_behind_a_copying_score_are_those_of_the_head(folder):
    pairs = Analysis(Checkpoint(folder / "block-l1_1")).copying
    app = open_page("pages/heads.py", checkpoint="block-l1_1", of_head="2")
    shown = app.dataframe[1].value
    assert (shown["rank of its logit"] - 1).tolist() == pairs.loc[pairs["head"] == 2, "rank"].tolist()
