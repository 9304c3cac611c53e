"""The Model page: every head of a model found, opened and exported, with SAEs and without."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis.heads.table import ModelHeads
from analysis.runs.model import columns_of, head_table
from analysis.runs.sets import layer_sets
from pages.charts import model as charts
from pages.charts.common import clicked
from tests.helpers import listed, open_page, said
from trainer.checkpoint import list_checkpoints

PAGE = "pages/model.py"


@pytest.fixture
def folder(layers_folder, show_copy):
    return show_copy(layers_folder)


def chosen(app) -> int:
    """The place of the row that is marked in the finder."""
    (proto,) = [of.proto for of in app.get("bidi_component") if of.proto.id.endswith("-heads")]
    return json.loads(proto.json)["chosen"]


def whole(folder):
    heads = ModelHeads(next(folder.glob("*.heads")))
    return head_table(heads, layer_sets(list_checkpoints(folder).readable)[0])[0]


def test_every_head_of_every_layer_is_there(folder):
    app = open_page(PAGE)
    assert not app.exception and not app.error
    table = whole(folder)
    assert len(table) == 24 and table["name"].iloc[[0, 5, 23]].tolist() == ["0.0", "1.1", "5.3"]
    assert table.loc[table["layer"] > 2, "FVU"].isna().all() and table.loc[table["layer"] <= 2, "FVU"].notna().all()
    assert (
        table.loc[table["layer"] == 1, "role_dfa"].notna().any()
        and table.loc[table["layer"] == 0, "role_dfa"].isna().all()
    )
    found = listed(app, "heads")
    assert set(found["name"]) == set(table["name"])
    assert found["induction"].tolist() == sorted(table["induction"], reverse=True)
    assert app.selectbox(key="saes").value == "tiny-batchtopk-x4-k5: 3 layers"
    assert len(app.get("vega_lite_chart")) == 2
    assert app.selectbox(key="at").value == table.loc[table["induction"].idxmax(), "name"] == found["name"][0]
    assert chosen(app) == 0 and "at" not in app.query_params


def test_the_finder_finds_what_is_asked_for(folder):
    table = whole(folder)
    bound = float(table["zero_KL"].median())
    app = open_page(PAGE, find="previous")
    assert listed(app, "heads")["previous"].tolist() == sorted(table["previous"], reverse=True)
    app.selectbox(key="find").set_value("zero_KL").run()
    app.number_input(key="bound").set_value(bound).run()
    names = set(listed(app, "heads")["name"])
    assert names == set(table.loc[table["zero_KL"] >= bound, "name"]) and 0 < len(names) < 24
    app.selectbox(key="side").set_value("at most").run()
    assert set(listed(app, "heads")["name"]) == set(table.loc[table["zero_KL"] <= bound, "name"])
    assert not app.exception


def test_a_head_has_its_link_and_its_card(folder):
    app = open_page(PAGE, at="1.2")
    assert not app.exception and app.selectbox(key="at").value == "1.2"
    assert listed(app, "heads")["name"][chosen(app)] == "1.2"
    assert "Head 1.2" in said(app) and "Its SAE: `tiny-L1-batchtopk-x4-k5`" in said(app)
    queries = [link.proto.query_string for link in app.get("page_link") if "of=" in link.proto.query_string]
    assert any("of=tiny-L1-batchtopk-x4-k5" in query and "head=2" in query for query in queries)
    app.selectbox(key="at").set_value("4.0").run()
    assert "There is no SAE of layer 4 here" in said(app) and app.query_params["at"] == "4.0"
    assert "Zeroed, on text" in str([each.proto.body for each in app.get("html")])
    known = list(columns_of(whole(folder)))
    assert {"induction", "zero_CE", "FVU"} <= set(known)
    for colour in ("zero_CE", "FVU", known[-1]):  # signed, not of all heads, of one layer
        app.selectbox(key="colour").set_value(colour).run()
        assert not app.exception, colour
    app.selectbox(key="colour").set_value("repeated_role_attention_besides_bos").run()
    assert not app.exception and len(app.get("vega_lite_chart")) == 2


def test_a_model_without_its_table_shows_the_layers_of_its_saes(folder):
    shutil.rmtree(next(folder.glob("*.heads")))
    app = open_page(PAGE)
    assert not app.exception
    assert any("python -m analysis.heads" in code.value for code in app.code)
    assert set(listed(app, "heads")["name"]) == {f"{layer}.{head}" for layer in range(3) for head in range(4)}


def test_a_model_without_saes_is_shown(folder):
    for path in folder.glob("tiny-*"):
        shutil.rmtree(path)
    app = open_page(PAGE)
    assert not app.exception and not app.error
    assert app.selectbox(key="saes").value == "none" and len(listed(app, "heads")) == 24


def test_a_damaged_table_is_a_sentence_and_the_saes_are_shown(folder):
    file = next(folder.glob("*.heads")) / "heads.parquet"
    file.write_bytes(file.read_bytes()[:200])
    app = open_page(PAGE)
    assert not app.exception
    assert "heads.parquet is damaged" in said(app) and len(listed(app, "heads")) == 12


def test_another_layer_is_another_checkpoint_on_every_page(folder):
    """Layers are picked by number; the same SAE there is chosen, and stays chosen on the next page."""
    app = open_page("pages/prompt.py", checkpoint="tiny-L0-batchtopk-x4-k5", prompt="it reads")
    assert app.selectbox(key="checkpoint").options == ["tiny-L0-batchtopk-x4-k5"]
    layer = app.selectbox(key="checkpoint-layer")
    assert layer.options == ["0", "1", "2"]
    layer.set_value(layer.value.replace("layer 0", "layer 2")).run()
    assert not app.exception and app.selectbox(key="checkpoint").value == "tiny-L2-batchtopk-x4-k5"
    app.query_params.clear()
    app = app.switch_page("pages/heads.py").run()
    assert not app.exception and app.selectbox(key="checkpoint").value == "tiny-L2-batchtopk-x4-k5"


@pytest.mark.parametrize(("n_layers", "n_heads"), [(12, 12), (48, 32)])
def test_a_large_model_is_one_small_chart(n_layers, n_heads):
    layer, head = (each.ravel() for each in np.mgrid[:n_layers, :n_heads])
    values = np.random.default_rng(0).normal(size=len(layer))
    names = [f"{a}.{b}" for a, b in zip(layer, head, strict=True)]
    frame = pd.DataFrame({"layer": layer, "head": head, "name": names, "copying": values, "zero_KL": values})
    frame.loc[3, "copying"] = np.nan
    drawn = charts.head_map(frame, "copying", "3.1").to_dict()
    assert drawn["width"]["step"] * n_heads <= 700 and drawn["height"]["step"] * n_layers <= 600
    (data,) = drawn["datasets"].values()
    assert len(data) == n_layers * n_heads and set(data[0]) == {"name", "layer", "head", "copying"}
    (points,) = charts.scatter(frame.dropna(), "copying", "zero_KL", None).to_dict()["datasets"].values()
    assert len(points) == n_layers * n_heads - 1


def test_a_click_beside_all_heads_chooses_none():
    assert clicked({"head": [{"name": "3.1"}]}, "head", "name") == "3.1"
    assert clicked({"head": []}, "head", "name") is clicked({}, "head", "name") is None


def test_from_page_to_page_the_box_keeps_its_checkpoint(folder):
    """A box that two pages have: on the second one it stood empty, although its checkpoint was shown."""
    app = open_page("pages/heads.py", checkpoint="tiny-L2-batchtopk-x4-k5")
    app.query_params.clear()
    app = app.switch_page("pages/prompt.py").run()
    assert not app.exception
    assert app.selectbox(key="checkpoint").value == "tiny-L2-batchtopk-x4-k5"
    assert app.query_params["checkpoint"] == "tiny-L2-batchtopk-x4-k5"
