"""`python -m analysis --summary`: the whole analysis' figures, less of them, and pages that say what is not there."""

import shutil

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.explain import explain
from analysis.export_csv import write_csv
from analysis.search import Tokens
from analysis.store import Analysis
from tests.helpers import ANALYSED, edit_json, open_page, said
from trainer.checkpoint import Checkpoint, CheckpointError

OPTIONS = ["--tokens=900", "--device=cpu"]
FILES = ["contexts.parquet", "examples.parquet", "features.parquet", "heads.parquet", "meta.json", "tokens.parquet"]


@pytest.fixture(scope="module")
def summarised(analysed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("summaries")
    for name in ANALYSED:
        shutil.copytree(analysed / name, folder / name)
        shutil.rmtree(folder / name / "analysis")
    assert main([*(str(folder / name) for name in ANALYSED), "--summary", *OPTIONS]) == 0
    return folder


@pytest.mark.parametrize("name", ANALYSED)
def test_it_says_what_the_whole_analysis_says(analysed, summarised, name):
    whole, short = (Analysis(Checkpoint(folder / name)) for folder in (analysed, summarised))
    assert short.is_summary and not whole.is_summary
    assert sorted(file.name for file in short.folder.iterdir()) == FILES
    assert set(short.features) < set(whole.features)
    pd.testing.assert_frame_equal(short.features, whole.features[list(short.features)], check_dtype=False, rtol=1e-5)
    pd.testing.assert_frame_equal(short.heads, whole.heads)
    assert short.patterns == {} and whole.patterns
    live = whole.features.index[whole.features["firings"] > 0]
    assert len(live)
    for feature in live[:20]:
        long, of_short = whole.feature(feature), short.feature(feature)
        assert of_short["description"] == long["description"]
        for name_of in ("fires_on_ids", "reads_counts", "top_logit_ids", "top_logits"):
            assert len(of_short[name_of]) == 5
            assert np.allclose(of_short[name_of], long[name_of][:5], rtol=2e-3)
        (first,) = short.examples(feature).itertuples()
        expected = next(whole.examples(feature).itertuples())
        assert (first.context, first.position, first.kind) == (expected.context, expected.position, "top")
        assert first.dfa_sum == pytest.approx(expected.dfa_sum, rel=1e-4, abs=1e-5)
        assert first.activations.tolist() == expected.activations.tolist()
        # Of the sources those that matter.
        large = (abs(expected.dfa) >= 0.11 * abs(expected.dfa).max()) | (expected.attention >= 0.11)
        assert (
            np.allclose(first.dfa[large], expected.dfa[large]) and (first.dfa != 0).sum() <= (expected.dfa != 0).sum()
        )


def test_it_is_searched_by_what_it_holds(summarised):
    short = Analysis(Checkpoint(summarised / ANALYSED[0]))
    found = short.search(head=1, density=(1e-3, 1.0))
    assert len(found) and set(found["head"]) == {1}
    promoted = short.strings[int(short.feature(int(found["feature"].iloc[0]))["top_logit_ids"][0])]
    assert found["feature"].iloc[0] in short.search(promotes=Tokens(promoted, "exact"))["feature"].tolist()
    with pytest.raises(CheckpointError, match="is a summary, which has no counts"):
        short.search(fires_on="the")


def test_what_it_lacks_is_named_with_the_command(summarised):
    short = Analysis(Checkpoint(summarised / ANALYSED[0]))
    for ask in (lambda: short.merging, lambda: short.copying, lambda: short.neighbours(0), lambda: short.detection(0)):
        with pytest.raises(CheckpointError, match=r"/analysis is a summary, which has no \w+") as raised:
            ask()
        assert raised.value.command.startswith("python -m analysis ")
    with pytest.raises(ValueError, match="is a summary"):
        explain(Checkpoint(summarised / ANALYSED[0]), "me", [0])


def test_it_is_exported(summarised, tmp_path):
    names = {file.name for file in write_csv(summarised / ANALYSED[0], tmp_path)}
    assert names == {"checkpoint.csv", "evaluation.csv", "features.csv", "heads.csv"}


def test_it_takes_no_whole_analysis_away_and_gives_way_to_one(analysed, summarised, tmp_path, capsys):
    name = ANALYSED[0]
    shutil.copytree(analysed / name, tmp_path / name)
    before = (tmp_path / name / "analysis" / "meta.json").read_bytes()
    assert main([str(tmp_path / name), "--summary", *OPTIONS]) == 2
    assert "holds more than a summary" in capsys.readouterr().err
    assert (tmp_path / name / "analysis" / "meta.json").read_bytes() == before
    shutil.rmtree(tmp_path / name / "analysis")
    shutil.copytree(summarised / name / "analysis", tmp_path / name / "analysis")
    assert main([str(tmp_path / name), *OPTIONS]) == 0
    assert not Analysis(Checkpoint(tmp_path / name)).is_summary


def test_one_that_calls_itself_whole_is_refused(summarised, tmp_path):
    name = ANALYSED[0]
    shutil.copytree(summarised / name, tmp_path / name)
    edit_json(tmp_path / name / "analysis" / "meta.json", summary=False)
    with pytest.raises(CheckpointError, match="no redundancy or descriptions"):
        Analysis(Checkpoint(tmp_path / name))


@pytest.mark.parametrize("name", ANALYSED)
def test_pages_show_it_and_say_what_is_missing(summarised, show_copy, name):
    show_copy(summarised)
    app = open_page("pages/features.py", checkpoint=name)
    assert not app.exception and not app.error
    assert "This is the summary of an analysis" in said(app) and "python -m analysis" in app.code[-1].value
    assert app.selectbox(key="fires").disabled and app.selectbox(key="reads").disabled
    assert "best described" not in app.selectbox(key="order").options
    for view in ("Overview", "Monosemanticity", "Redundancy across heads"):
        app = open_page("pages/heads.py", checkpoint=name, show=view)
        assert not app.exception and not app.error, view
        assert ("summary" in said(app)) == (view != "Monosemanticity")
    app = open_page("pages/compare.py", a=name, b=ANALYSED[1] if name == ANALYSED[0] else ANALYSED[0])
    assert not app.exception and "is a summary, which has no merging" in said(app)
    app = open_page("pages/start.py", checkpoint=name)
    assert not app.exception and not app.error
