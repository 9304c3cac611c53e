"""The Circuit page on a tiny set: a target is chosen by hand, its graph and table agree, and pages lead on."""

import shutil

import pytest

from analysis.__main__ import main as analyse
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
    assert nodes["attribution"].abs().dropna().is_monotonic_decreasing
    features = nodes[nodes["name"].str.contains("feature")]
    assert len(features) and features["effect"].notna().any()
    assert "The target is" in said(app)
    assert [each.proto.label for each in app.get("download_button")] == ["The circuit as JSON"]


def test_another_target_is_another_circuit(folder):
    app = open_page(PAGE, prompt="of the and of the")
    first = listed(app, "nodes")
    app = choose(app, "next", 3)
    second = listed(app, "nodes")
    assert first["attribution"].tolist() != second["attribution"].tolist()
    app = choose(app, "against", -1)
    assert not app.error
    app = choose(app, "at", 0)
    assert not app.error and set(listed(app, "nodes")["token"].str.split(":").str[0]) <= {"0", "1"}


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


def test_the_curve_is_drawn_where_it_is_asked_for(folder):
    app = open_page(PAGE, prompt="of the and of the")
    app.toggle(key="curve").set_value(True).run()
    assert not app.exception and not app.error
    assert len(app.get("vega_lite_chart")) == 2
    app.toggle(key="errors").set_value(False).run()
    assert not app.exception and not app.error


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


@pytest.mark.parametrize("prompt", ["", "x " * 400])
def test_what_is_no_prompt_is_a_sentence(folder, prompt):
    app = open_page(PAGE, prompt=prompt)
    assert not app.exception and len(app.error) == 1
