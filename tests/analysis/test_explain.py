"""Explanations from elsewhere: asked for, scored on the examples of detection, and kept."""

import json
import shlex
import shutil
import sys

import numpy as np
import pytest

from analysis import explain
from analysis.__main__ import main as analyse
from analysis.detection import detected
from analysis.explain import Answer
from analysis.store import Analysis
from trainer.checkpoint import Checkpoint, CheckpointError

PROGRAM = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["task"] == "explain":
        tokens, activations = asked["examples"][0]["tokens"], asked["examples"][0]["activations"]
        answer = {"explanation": tokens[activations.index(max(activations))]}
    else:
        answer = {"scores": [float(example["tokens"][-1] == asked["explanation"]) for example in asked["examples"]]}
    print(json.dumps({"feature": asked["feature"], **answer}))
"""


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    path = shutil.copytree(trained / "batchtopk", tmp_path_factory.mktemp("explained") / "a")
    assert analyse([str(path), "--tokens=600", "--score_tokens=600", "--examples=3", "--device=cpu"]) == 0
    return path


@pytest.fixture
def path(analysed, tmp_path):
    return shutil.copytree(analysed, tmp_path / "a")


@pytest.fixture
def program(tmp_path) -> str:
    (tmp_path / "ask.py").write_text(PROGRAM)
    return shlex.join([sys.executable, str(tmp_path / "ask.py")])


def scored(path) -> list[int]:
    features = Analysis(Checkpoint(path)).features
    return features.index[features["description_auroc"].notna()].tolist()


def test_a_program_explains_and_is_scored_on_the_examples_of_descriptions(path, program, capsys):
    assert explain.main([str(path), f"--program={program}", "--by=strongest token"]) == 0
    checkpoint = Checkpoint(path)
    analysis, table = Analysis(checkpoint), explain.explanations(checkpoint)
    assert table["feature"].tolist() == scored(path)
    assert (
        f"{len(table)} explanations by strongest token, {len(table)} of them scored: AUROC" in capsys.readouterr().out
    )
    for row in table.head(20).itertuples():
        top = analysis.examples(row.feature).iloc[0]
        assert row.explanation == analysis.strings[int(top["token_ids"][top["activations"].argmax()])]
        own = analysis.detection(row.feature)
        on_it = np.array([analysis.strings[int(ids[-1])] == row.explanation for ids in own["token_ids"]])
        expected = detected(own["fires"].to_numpy(), on_it.astype(float), own["context"].to_numpy())
        found = row.accuracy, row.accuracy_se, row.auroc, row.auroc_se
        assert found == pytest.approx(tuple(expected), nan_ok=True)


def test_explanations_are_kept_by_who_made_them(path):
    checkpoint = Checkpoint(path)
    first, second = scored(path)[:2]
    fires = Analysis(checkpoint).detection(first)["fires"].astype(float).tolist()
    explain.explain(checkpoint, "me", answers=[Answer(first, "old"), Answer(second, "two")])
    explain.explain(checkpoint, "you", answers=[Answer(first, "mine")])
    explain.explain(checkpoint, "me", answers=[Answer(first, "new", fires)])
    table = explain.explanations(checkpoint)
    assert list(zip(table["feature"], table["by"], table["explanation"], strict=True)) == [
        (first, "me", "new"), (first, "you", "mine"), (second, "me", "two")]  # fmt: skip
    assert table["auroc"].fillna(-1).tolist() == [1, -1, -1]


def test_a_file_of_explanations_is_judged_by_a_program(path, program, tmp_path):
    one, other = scored(path)[:2]
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"feature": i, "explanation": " "}) + "\n\n" for i in (one, other))
    )
    arguments = [str(path), f"--file={tmp_path / 'mine.jsonl'}", f"--features={one}"]
    assert explain.main(arguments) == 0
    assert explain.explanations(Checkpoint(path))["auroc"].isna().tolist() == [True]
    assert explain.main([*arguments, f"--program={program}"]) == 0
    table = explain.explanations(Checkpoint(path))
    assert (table["feature"].tolist(), table["by"].tolist()) == ([one], ["mine.jsonl"])
    assert 0 <= table["auroc"].iloc[0] <= 1


def test_refusals(path, tmp_path, capsys):
    feature = scored(path)[0]

    def refused(*more: str) -> str:
        assert explain.main([str(path), *more]) == 2
        return capsys.readouterr().err

    (tmp_path / "bad.jsonl").write_text('{"feature": 1}\n{"feature": "x"}')
    (tmp_path / "few.jsonl").write_text(json.dumps({"feature": feature, "explanation": "a", "scores": [1]}))
    (tmp_path / "gone.jsonl").write_text('{"feature": 99999, "explanation": "a"}')
    assert "name a --program, a --file or both" in refused()
    assert "bad.jsonl, line 2: " in refused(f"--file={tmp_path / 'bad.jsonl'}")
    assert f"feature {feature} has " in refused(f"--file={tmp_path / 'few.jsonl'}")
    assert "there is no feature 99999" in refused(f"--file={tmp_path / 'gone.jsonl'}")
    assert "there is no feature 99999" in refused("--program=cat", "--features=99999")
    assert "false failed" in refused("--program=false", f"--features={feature}")
    assert "no-such-program failed" in refused("--program=no-such-program", f"--features={feature}")
    assert not (path / "explanations.json").exists(), "nothing was kept"
    explain.explain(Checkpoint(path), "me", answers=[Answer(feature, "mine")])
    file = path / "explanations.json"
    file.write_text(file.read_text().replace(Checkpoint(path).weights_hash, "others"))
    with pytest.raises(CheckpointError, match="explains other weights"):
        explain.explanations(Checkpoint(path))
    file.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        explain.explanations(Checkpoint(path))
