"""The Tradeoffs page: its figures against eval.json, its Pareto lines against brute force, what a selection means."""

import json
import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from analysis.runs import tables
from pages.charts import tradeoffs as tradeoff_charts
from tests import helpers
from tests.helpers import OTHERS, edit_config, edit_json, said
from trainer.checkpoint import list_checkpoints, read_metrics

open_page = partial(helpers.open_page, "pages/tradeoffs.py")


def table(app) -> pd.DataFrame:
    return app.dataframe[0].value.set_index("name")


def drawn(app) -> dict | None:
    """The frontier as Vega-Lite, if there is one."""
    specs = [json.loads(chart.proto.spec) for chart in app.get("vega_lite_chart")]
    return next((spec for spec in specs if "layer" in spec), None)


@pytest.mark.parametrize(
    ("query", "of"),
    [
        ({}, lambda figures: {**figures, "MSE_per_dim": figures["MSE"] / 32}),
        ({"text": "Repeated random tokens"}, lambda figures: figures["induction"]),
        ({"head": "2"}, lambda f: {key: f[f"{key}_per_head"][2] for key in ("MSE", "FVU", "KL_score", "CE_score")}
                                  | {"MSE_per_dim": f["MSE_per_head"][2] / 8}),
        ({"head": "3", "text": "Repeated random tokens"},
         lambda f: {key: f["induction"][f"{key}_per_head"][3] for key in ("MSE", "FVU", "KL_score", "CE_score")}),
    ],
)  # fmt: skip
def test_the_table_says_what_eval_says(folder, query, of):
    shown = table(open_page(**query))
    assert len(shown) == 8
    for name, row in shown.iterrows():
        figures = json.loads((folder / name / "eval.json").read_text())
        expected = {key: np.nan if value is None else value for key, value in of(figures).items()}
        for key in ("MSE", "FVU", "KL_score", "CE_score", "MSE_per_dim"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], nan_ok=True), (name, key)
        if "head" in query:
            source = figures["induction"] if "text" in query else figures
            l0 = np.nan if name == "dense" else source["L0_per_head"][int(query["head"])]
            assert row["L0"] == pytest.approx(l0, nan_ok=True)


def test_silent_is_of_the_evaluation_and_dead_of_the_training(folder):
    for query, part in ({}, slice(None)), ({"head": "2"}, 2):
        for name, row in table(open_page(**query)).iterrows():
            figures, last = json.loads((folder / name / "eval.json").read_text()), read_metrics(folder / name)[-1]
            keys = [f"{word}_fraction{'_per_head' if query else ''}" for word in ("silent", "dead")]
            if query and name == "dense":
                assert np.isnan([row["silent_fraction"], row["dead_fraction"]]).all()
                continue
            expected = [of[key][part] if query else of[key] for of, key in zip((figures, last), keys, strict=True)]
            assert [row["silent_fraction"], row["dead_fraction"]] == pytest.approx(expected), name
    edit_json(folder / "topk" / "eval.json", silent_fraction=0.5)
    shown = table(open_page()).loc["topk"]
    assert shown["silent_fraction"] == 0.5 != shown["dead_fraction"]


@pytest.mark.parametrize(
    ("score", "words"),
    [(1.2, "CE score above 1: predicts better than without the SAE: topk"),
     (-0.1, "CE score below 0: worse than zero ablation: topk"), (0.5, ""), (None, "")],
)  # fmt: skip
def test_a_score_that_is_no_share_is_put_into_words(folder, score, words):
    edit_json(folder / "batchtopk" / "eval.json", CE_score=0.5, CE_score_se=0.1)
    edit_json(folder / "topk" / "eval.json", CE_score=score, CE_score_se=None if score is None else 0.1)
    text = said(open_page(runs="topk"))
    assert words in text and (words or ("above 1" not in text and "below 0" not in text))
    assert ("No checkpoint has" in text) is False


def test_what_a_point_costs(folder):
    shown = table(open_page())
    for name, row in shown.iterrows():
        assert row["parameters"] == sum(p.numel() for p in load_file(folder / name / "sae.safetensors").values())
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [5, 10, 15, 20]
        assert row["tokens_seen"] == 20 * 128
        assert row["training_minutes"] * 60 == pytest.approx(sum(5 * 128 / line["tokens_per_second"] for line in lines))


def test_an_unknown_cost_is_empty(folder):
    (folder / "dense" / "metrics.jsonl").unlink()
    lines = read_metrics(folder / "topk")
    del lines[1]["tokens_per_second"]
    (folder / "topk" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = table(open_page())["training_minutes"]
    assert shown[["dense", "topk"]].isna().all()
    assert shown.drop(["dense", "topk"]).notna().all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 6), st.integers(-3, 6)), min_size=1, max_size=12),
    st.sampled_from(["FVU", "KL_score"]),
)
def test_the_pareto_line_against_brute_force(points, metric):
    frame = pd.DataFrame(points, columns=["recipe", "L0", metric]).sample(frac=1, random_state=0)
    sign = -1 if metric == "KL_score" else 1

    def beats(other, row):
        ours, theirs = (row["L0"], sign * row[metric]), (other["L0"], sign * other[metric])
        return other["recipe"] == row["recipe"] and theirs != ours and theirs[0] <= ours[0] and theirs[1] <= ours[1]

    expected = [not any(beats(other, row) for _, other in frame.iterrows()) for _, row in frame.iterrows()]
    assert tables.pareto(frame, metric).tolist() == expected


def test_a_selection_is_the_rectangle_or_else_the_clicked_points():
    frame = pd.DataFrame({"name": ["a", "b", "c"], "L0": [1.0, 10.0, 100.0], "FVU": [0.9, 0.5, 0.1]})
    picked = tradeoff_charts.picked
    assert picked(frame, {"several": {"L0": [5, 200], "FVU": [0.6, 0.05]}, "one": [{"name": "a"}]}) == ["b", "c"]
    assert picked(frame, {"several": {}, "one": [{"name": "c"}, {"name": "gone"}]}) == ["c"]
    assert picked(frame, {"several": {"L0": [2, 3], "FVU": [0, 1]}}) == []
    assert picked(frame, {}) == []


def test_the_url_keeps_a_selection(folder):
    app = open_page(runs=["topk", "dense"])
    assert not app.exception
    assert set(table(app).index) == {"topk", "dense"}
    chosen = {row["name"]: row["chosen"] for row in rows(app)}
    assert {name for name, marked in chosen.items() if marked} == {"topk", "dense"} and len(chosen) == 8
    app.multiselect(key="runs").set_value([]).run()
    assert len(table(app)) == 8 and all(row["chosen"] for row in rows(app))


def rows(app) -> list[dict]:
    """The points of the frontier."""
    from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df

    chart = app.get("vega_lite_chart")[0].proto
    frames = [convert_arrow_bytes_to_pandas_df(data.data.data) for data in chart.datasets]
    return max(frames, key=len).to_dict("records")


def test_targets_are_drawn_where_the_axes_show_them(folder):
    frame = tables.summary(list_checkpoints(folder).readable).assign(front=True, chosen=True, CE_score=0.5)

    def says(metric, head):
        chart = str(tradeoff_charts.tradeoff(frame, metric, True, sorted(set(frame["recipe"])), head).to_dict())
        return [text for text in ("L0 20", "CE score 0.8") if text in chart]

    assert says("FVU", None) == ["L0 20"]
    assert says("CE_score", None) == ["L0 20", "CE score 0.8"]
    assert says("KL_score", 1) == says("CE_score", 1) == []


@pytest.mark.slow
def test_every_figure_on_every_text_and_head_draws(folder):
    app, charts = open_page(), 0
    for metric in tables.METRICS:
        for text in ("Held-out text", "Repeated random tokens"):
            for head in ("all", "2") if text == "Held-out text" else ("2",):
                app.segmented_control(key="text").set_value(text)
                app.selectbox(key="head").set_value(head).run()
                if metric.replace("_", " ") in app.segmented_control(key="y").options:
                    app.segmented_control(key="y").set_value(metric).run()
                else:  # the tiny model's heads may cost nothing
                    assert f"No checkpoint has a {metric.replace('_', ' ')} here" in said(app)
                    assert metric in tables.SCORES and metric not in app.dataframe[0].proto.column_order
                    continue
                assert not app.exception and not app.error
                assert ("has no L0 of one head: dense" in said(app)) == (head == "2")
                spec = drawn(app)
                charts += 1
                (points,) = (layer["encoding"] for layer in spec["layer"] if "shape" in layer["encoding"])
                title = points["y"]["title"]
                assert tables.METRICS[metric].split(" (")[0] in title and ("head 2" in title) == (head == "2")
    assert charts >= 9


def test_a_run_without_eval_is_on_text_and_waits_on_repeated_tokens(folder):
    path = folder / "topk"
    (path / "eval.json").unlink()
    edit_config(path, status="training")
    app = open_page()
    assert "Hollow" in said(app)
    assert "topk" in [row["name"] for row in rows(app)]
    one = table(open_page(head="1")).loc["topk"]
    assert one["L0"] == pytest.approx(read_metrics(path)[-1]["L0_per_head"][1])
    app = open_page(text="Repeated random tokens")
    assert "Not evaluated yet: topk" in said(app)
    assert "topk" not in [row["name"] for row in rows(app)]


def test_an_imported_checkpoint_stands_beside_ours(folder):
    path = folder / "topk"
    imported = {"source": "SAELens topk", "recipe": "SAELens topk", "k": 9}
    edit_config(path, options=None, imported=imported, steps=None, tokens_seen=None)
    (path / "metrics.jsonl").unlink()
    app = open_page(runs="topk")
    assert not app.exception and not app.error
    row = table(app).loc["topk"]
    assert row["recipe"] == "SAELens topk" and np.isnan(row["tokens_seen"]) and np.isnan(row["training_minutes"])
    assert "Nothing was logged" in said(app)


def test_a_head_that_is_silent_is_named_and_not_drawn_on_log_axes(folder):
    edit_json(folder / "dense" / "eval.json", L0=0)
    app = open_page()
    assert "because a value is 0: dense" in said(app)
    assert "dense" not in [row["name"] for row in rows(app)]
    assert "dense" in [row["name"] for row in rows(open_page(log="false"))]


def test_damaged_metrics_leave_the_frontier(folder):
    (folder / "dense" / "metrics.jsonl").write_text("nonsense\n")
    app = open_page()
    assert not app.exception and "metrics.jsonl is damaged" in app.error[0].value
    assert len(rows(app)) == 8


def test_only_points_of_a_front_have_a_label(folder):
    listed = list_checkpoints(folder).readable
    frame = tables.summary(listed).assign(front=False, chosen=True)
    frame.loc[[1, 3], "front"] = True
    chart = tradeoff_charts.tradeoff(frame, "FVU", True, sorted(frame["recipe"].unique()), None).to_dict()
    (labels,) = (layer for layer in chart["layer"] if layer["encoding"].get("text", {}).get("field") == "sparsity")
    assert labels["transform"] == [{"filter": "datum.front"}] and labels["mark"]["dx"] == 10
    (points,) = (layer for layer in chart["layer"] if "shape" in layer["encoding"])
    assert "sparsity" in [tip["field"] for tip in points["encoding"]["tooltip"]], "of the others the tooltip tells it"


def test_bins_hold_every_token_and_the_tail_is_in_the_last():
    frame = pd.DataFrame([("a", 0, l0, 0.2498 / 25) for l0 in range(100)] + [("a", 0, 5000, 0.0008)],
                         columns=["name", "head", "L0", "share"])  # fmt: skip
    binned = tables.binned(frame, 10)
    assert binned["share"].sum() == pytest.approx(1) and len(binned) <= 12
    assert binned["end"].max() < 200 and (binned["end"] - binned["start"]).nunique() == 1


def test_long_logs_are_thinned_to_their_last_line():
    frame = pd.DataFrame({"name": "a", "step": range(5000), "FVU": 1.0, "held_out_FVU": np.nan})
    frame.loc[[1000, 3000], "held_out_FVU"] = 0.5
    thin = tables.thinned(frame, "FVU", 400)
    assert len(thin) <= 400 and thin["step"].iloc[-1] == 4999
    assert tables.thinned(frame, "held_out_FVU", 400)["step"].tolist() == [1000, 3000]


def test_every_recipe_has_its_colour_and_dense_its_shape(folder):
    points = next(layer for layer in drawn(open_page())["layer"] if "shape" in layer["encoding"])
    shape = points["encoding"]["shape"]["scale"]
    shapes = dict(zip(shape["domain"], shape["range"], strict=True))
    assert set(shapes) == {"april", "april (dense)", *OTHERS}
    assert {recipe for recipe, mark in shapes.items() if mark == "square"} == {"april (dense)"}
    assert len(set(points["encoding"]["color"]["scale"]["range"])) == len(shapes)


@pytest.mark.parametrize(
    "figure", ["a:N", "mean(a)", "datum['a'].b", "a\\.b[0]", "step:Q", "![x](http://a.b/c)", "value"]
)
def test_a_logged_figure_may_have_any_name(figure):
    frame = pd.DataFrame({"name": "x", "recipe": "topk", "step": [1, 2], "tokens": [8, 16], figure: [0.5, 0.25]})
    spec = tradeoff_charts.training_curves(frame, figure, ["topk"]).to_dict()
    encoding = spec["encoding"]
    assert encoding["y"] | {"scale": None} == {
        "field": "value", "type": "quantitative", "scale": None,
        "title": f"{figure.replace('_', ' ')} (training batch)",
    }  # fmt: skip
    assert (encoding["tooltip"][3]["field"], encoding["tooltip"][3]["title"]) == ("value", figure)
    (rows,) = spec["datasets"].values()
    assert [row["value"] for row in rows] == [0.5, 0.25]


def test_it_opens_where_most_checkpoints_are(show_copy, layers_folder):
    copy = show_copy(layers_folder)
    assert "layer 0" in open_page().selectbox(key="site").value  # of equally many the first
    shutil.copytree(next(copy.glob("*-L2-*")), copy / "another")
    app = open_page()
    assert "layer 2" in app.selectbox(key="site").value and len(table(app)) == 2
    assert [each.rpartition(" ")[2] for each in app.selectbox(key="site").options] == ["2", "0", "1"]
