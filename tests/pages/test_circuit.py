"""The Circuit page on a tiny set: a target is chosen by hand, its graph and table agree, and pages lead on."""

import re
import shutil

import pandas as pd
import pyarrow.ipc
import pytest

from analysis.__main__ import main as analyse
from pages.charts import circuit as charts
from pages.charts.common import clicked
from pages.sections.circuit_choices import TOUR
from tests.helpers import listed, open_page, said

PAGE = "pages/circuit.py"


@pytest.fixture(scope="module")
def summarised(layers_folder, tmp_path_factory):
    """A set of three layers, each with the summary of an analysis."""
    out = tmp_path_factory.mktemp("circuit") / "set"
    shutil.copytree(layers_folder, out)
    paths = sorted(out.glob("*-x4-k5"))
    for path in paths:
        shutil.rmtree(path / "analysis", ignore_errors=True)
    assert analyse([*map(str, paths), "--summary", "--tokens=300", "--device=cpu"]) == 0
    return out


@pytest.fixture
def folder(summarised, show_copy):
    return show_copy(summarised)


def choose(app, key: str, index: int):
    box = app.selectbox(key=key)
    box.select(box.options[index])
    app.run()
    assert not app.exception and not app.error
    return app


def test_the_circuit_of_the_likeliest_token(folder):
    app = open_page(PAGE, prompt="of the and of the")
    assert not app.exception and not app.error
    assert len(app.get("vega_lite_chart")) == 1
    nodes = listed(app, "nodes")
    assert len(nodes) > 1 and nodes["attribution"].notna().any()
    features = nodes[nodes["what"].str.contains("feature")]
    assert len(features) and features["effect"].notna().any()
    assert features["attribution"].abs().dropna().is_monotonic_decreasing
    assert features.index[0] == nodes.index[0]
    names = {f"{row['what']} at {row['at']}" for _, row in nodes.iterrows()}
    assert features["reads"].iloc[0] in names and set(nodes["reads"]) | set(nodes["because"]) <= names | {""}
    assert "The target is" in said(app)
    predictions = listed(app, "predictions")
    assert len(predictions) == 10 and predictions["probability"].is_monotonic_decreasing
    assert [each.proto.label for each in app.get("download_button")] == ["The circuit as JSON"]


def test_another_target_is_another_circuit(folder):
    app = open_page(PAGE, prompt="of the and of the")
    first = listed(app, "nodes")
    app = choose(app, "next", 3)
    second = listed(app, "nodes")
    assert first["attribution"].tolist() != second["attribution"].tolist()
    app = choose(app, "against", -1)
    assert not app.error
    app = choose(app, "at", -1)
    assert not app.error and set(listed(app, "nodes")["at"].str.split(":").str[0]) <= {"0", "1"}


def test_sliders_make_it_smaller_and_a_prompt_of_ones_own_begins_anew(folder):
    app = open_page(PAGE, prompt="of the and of the")
    app.slider(key="features").set_value(2).run()
    small = len(listed(app, "nodes"))
    app.slider(key="share").set_value(100).run()
    assert len(listed(app, "nodes")) <= small
    app.slider(key="depth").set_value(0).run()
    assert len(listed(app, "nodes")) == 2
    app.text_area(key="prompt").set_value("and and the of").run()
    assert not app.exception and not app.error and len(listed(app, "nodes"))


def table_with(app, column: str, place: int = 0) -> list[dict]:
    """Nodes or edges of the graph, or another chart's rows, as it has them."""
    chart = app.get("vega_lite_chart")[place].proto
    tables = [pyarrow.ipc.open_stream(each.data.data).read_pandas() for each in chart.datasets]
    return next(table for table in tables if column in table).to_dict("records")


def drawn(app) -> list[dict]:
    return table_with(app, "opens")


def test_heads_are_nodes_and_the_one_that_is_looked_into_is_open(folder):
    app = open_page(PAGE, prompt="of the and of the")
    features = [row for row in drawn(app) if row["kind"] == "feature"]
    app.button_group(key="inside").set_value("Heads").run()
    assert not app.exception and not app.error
    rows = drawn(app)
    groups = [row for row in rows if row["kind"] == "group"]
    still = [row for row in rows if row["kind"] == "feature"]
    assert groups and still and len(rows) < len(listed(app, "nodes"))
    (head,) = {row["what"].split(" ")[0] for row in still}  # of the node that is marked
    assert sum(row["marked"] for row in rows) == 1 and [row["marked"] for row in still].count(True) == 1
    other = next(row for row in groups if row["what"] != head)
    app.selectbox(key="node").select(other["opens"]).run()  # what a click on it does
    assert (
        not app.exception
        and other["what"] == {row["what"].split(" ")[0] for row in drawn(app) if row["kind"] == "feature"}.pop()
    )
    assert len(features) >= len(still)


def test_an_edge_says_what_it_sums(folder):
    app = open_page(PAGE, prompt="of the and of the", features=40)
    assert not app.exception and not app.error
    lines, sums = table_with(app, "whole"), []
    several = {f"{row['what']} at {row['token']}" for row in drawn(app) if ";" in row["words"]}
    between = next(
        line for line in lines if line["by"] == "attribution" and line["name"].split(" \u2192")[0] in several
    )
    for line in (between, *(next(line for line in lines if line["by"] == by) for by in ("OV", "K"))):
        app.selectbox(key="edge").select(line["name"]).run()
        assert not app.exception and not app.error
        value, whole = map(float, re.search(r"(\S+) of (\S+): ", "".join(each.value for each in app.text)).groups())
        assert (value, whole) == pytest.approx((line["value"], line["whole"]), abs=6e-4)
        assert [each["name"] for each in table_with(app, "whole") if each["marked"]] == [line["name"]]
        members = [each.value for each in app.dataframe if {"written by", "read by"} <= set(each.value)]
        sums += [(float(each["value"].sum()), value) for each in members]
    assert sums and [each for each, _ in sums] == pytest.approx([value for _, value in sums], abs=2e-3)
    app.text_area(key="prompt").set_value("and and the of").run()
    assert app.selectbox(key="edge").value == "none" and not app.error


def test_nodes_that_stand_side_by_side_have_room():
    nodes = pd.DataFrame({"kind": ["feature"] * 4 + ["mlp"], "layer": [3, 3, 3, 1, 2], "position": [2, 2, 2, 0, 2]})
    placed, tokens = charts.placed(nodes, 3)
    assert placed["x"].tolist() == pytest.approx([2.1, 3.1, 4.1, 0.5, 3.1]) and placed["y"].iloc[-1] == 2.5
    assert tokens == pytest.approx([0.5, 1.3, 3.1])
    described = placed.assign(
        what="", token="", words="", opens="", label="", size=1.0, attribution=0.0, activation=0.0, marked=False
    )
    edge = {"x": 0.5, "y": 1, "x2": 4.1, "y2": 3, "by": "OV", "value": 1.0, "strength": 1.0}
    edges = pd.DataFrame([edge | {"edge": "", "name": "", "marked": False}])
    spec = charts.graph(described, edges, dict(zip(tokens, "abc", strict=True)), 4).to_dict()
    domains = [layer["encoding"]["x"]["scale"]["domain"] for layer in spec["layer"]]
    assert domains and all(domain == pytest.approx([0, 4.6]) for domain in domains)


def test_a_click_tells_of_one_thing():
    edge = {"edge": [{"name": "a"}], "node": [{"name": "a"}]}  # as a browser has it: every selection hears of it
    assert (clicked(edge, "edge", "name"), clicked(edge, "node", "opens")) == ("a", None)
    assert clicked({}, "node", "opens") is clicked({"node": []}, "node", "opens") is None


def test_nodes_are_grouped_by_hand_under_a_name(folder):
    app = open_page(PAGE, prompt="of the and of the")
    names = app.multiselect(key="group0").options[:3]
    app.multiselect(key="group0").set_value(names).run()
    app.text_input(key="called0").set_value("mine").run()
    assert not app.exception and not app.error
    (mine,) = [row for row in drawn(app) if row["what"] == "mine"]
    assert mine["kind"] == "group" and len(mine["words"].split("; ")) == 3
    whole = listed(app, "nodes")["attribution"].iloc[:3].sum()
    assert mine["attribution"] == pytest.approx(whole, rel=1e-3, abs=1e-3)
    app.selectbox(key="next").select(app.selectbox(key="next").options[2]).run()  # whose circuit may lack them
    assert not app.exception and not app.error


def test_a_feature_is_explained_by_hand_and_from_a_node(folder):
    app = open_page(PAGE, prompt="of the and of the")
    box = app.selectbox(key="what")
    later = next(name for name in box.options[1:] if name.startswith("2."))
    app = choose(app, "what", box.options.index(later))
    assert not [each for each in app.selectbox if each.key == "next"]
    below = {int(name.split(" ")[-2 if "feature" in name else -1].split(".")[0]) for name in features_of(app)}
    assert below and max(below) < 2  # nothing of its own layer, or above it, makes it fire
    app = choose(app, "what", 0)
    at = next(place for place, name in enumerate(app.selectbox(key="node").options) if not name.startswith("0."))
    app = choose(app, "node", at)
    explained = app.selectbox(key="node").value
    app.button[[each.label for each in app.button].index("Explain it instead")].click().run()
    assert not app.exception and not app.error
    assert f"{app.selectbox(key='what').value} at {app.selectbox(key='at').value}" == explained


def features_of(app) -> list[str]:
    names = listed(app, "nodes")["what"]
    return [name.split(" feature")[0] for name in names if "feature" in name]


def test_integrated_gradients_are_another_attribution(folder):
    app = open_page(PAGE, prompt="of the and of the")
    before = listed(app, "nodes")["attribution"].dropna().tolist()
    app.button_group(key="by").set_value("integrated gradients").run()
    assert not app.exception and not app.error
    assert listed(app, "nodes")["attribution"].dropna().tolist() != before


def test_the_curve_is_drawn_where_it_is_asked_for(folder):
    app = open_page(PAGE, prompt="of the and of the")
    app.toggle(key="curve").set_value(True).run()
    assert not app.exception and not app.error
    assert len(app.get("vega_lite_chart")) == 2
    of_means = table_with(app, "share", 1)
    app.toggle(key="errors").set_value(False).run()
    assert not app.exception and not app.error
    app.toggle(key="errors").set_value(True).run()
    app.button_group(key="others").set_value("what they are on other text").run()
    assert not app.exception and not app.error
    assert [row["share"] for row in of_means] != [row["share"] for row in table_with(app, "share", 1)]
    app.text_area(key="prompt").set_value("of the and " * 20).run()
    assert not app.exception and "a context of other text 32" in app.error[0].value


def test_a_layer_without_an_analysis_says_so_instead_of_the_curve(folder):
    shutil.rmtree(next(folder.glob("*-L1-*")) / "analysis")
    app = open_page(PAGE, prompt="of the and", curve="true")
    assert not app.exception and not app.error
    assert "needs an analysis of every layer" in said(app) + str([each.value for each in app.info])


def test_one_layer_is_no_set(folder):
    for name in ("L0", "L2"):
        shutil.rmtree(next(folder.glob(f"*-{name}-*")))
    app = open_page(PAGE)
    assert not app.exception and "SAEs on several layers" in app.info[0].value
    assert "sweeps/layers.yaml" in app.code[0].value


def test_what_the_tour_says_stands_beside_what_it_is_about(folder):
    example = TOUR["Agreement"]
    app = open_page(PAGE, prompt=example.prompt)
    assert not app.exception and "agrees with" not in said(app)
    app = open_page(PAGE, prompt=example.prompt, **example.chosen)
    assert not app.exception and "agrees with" in said(app)


def test_any_token_can_be_typed(folder):
    app = open_page(PAGE, prompt="of the and of the", next="a", against="x" * 500)
    assert not app.exception and not app.error
    (warning,) = [each.value for each in app.warning]
    assert "is no single token" in warning and len(warning) < 200
    app = open_page(PAGE, prompt="of the and of the", next="a", against="o")
    assert not app.warning and app.selectbox(key="next").value == "a"
    both = app.markdown[0].value
    swapped = open_page(PAGE, prompt="of the and of the", next="o", against="a").markdown[0].value
    value, other = (float(re.search(r"\*\*(-?[\d.]+)\*\*", each)[1]) for each in (both, swapped))
    assert value == pytest.approx(-other, abs=2e-3) != 0


@pytest.mark.parametrize("value", ["9" * 30, "-1", "", "<img src=x onerror=alert(1)>", "a%00b", "nan (99999999)"])
def test_a_hostile_address_is_a_page(folder, value):
    keys = "saes at what next against features depth share begin by inside node group0 called0 errors curve edge others"
    app = open_page(PAGE, prompt="of the and", **dict.fromkeys(keys.split(), value))
    assert not app.exception


@pytest.mark.parametrize("prompt", ["", "x " * 400])
def test_what_is_no_prompt_is_a_sentence(folder, prompt):
    app = open_page(PAGE, prompt=prompt)
    assert not app.exception and len(app.error) == 1
