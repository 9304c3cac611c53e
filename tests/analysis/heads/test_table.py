"""The command from a model to a folder, and what is refused on the way and afterwards, each with one sentence."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis.attribution import SLOTS
from analysis.heads import run
from analysis.heads.__main__ import main
from analysis.heads.table import ABLATIONS, ModelHeads, list_models
from tests.helpers import edit_json
from trainer.checkpoint import CheckpointError, list_checkpoints


def arguments(model, text, out, *more: str) -> list[str]:
    few = ("--context_size=24", "--tokens=200", "--repeated_tokens=150", "--removal_tokens=60", "--device=cpu")
    return [str(model), f"--dataset={text}", f"--out={out}", *few, *more]


@pytest.fixture(scope="module")
def out(tmp_path_factory, gpt2_folder, llama_folder, text_file):
    """Two models: LayerNorm with ordinary attention, and RMSNorm with grouped queries."""
    folder = tmp_path_factory.mktemp("described")
    assert main(arguments(gpt2_folder, text_file, folder)) == 0
    assert main(arguments(llama_folder, text_file, folder, "--removal_tokens=0")) == 0
    return folder


@pytest.fixture
def copied(out, gpt2_folder, tmp_path):
    return shutil.copytree(out / f"{gpt2_folder.name}.heads", tmp_path / f"{gpt2_folder.name}.heads")


@pytest.mark.parametrize("which", ["gpt2", "llama"])
def test_the_table_of_a_model(which, out, request):
    folder, lm = request.getfixturevalue(f"{which}_folder"), request.getfixturevalue(which)
    found = ModelHeads(out / f"{folder.name}.heads")
    table = found.heads
    assert (found.n_layers, found.n_heads) == (lm.n_layers, lm.n_heads)
    assert table[["layer", "head"]].to_numpy().tolist() == [
        [i, j] for i in range(lm.n_layers) for j in range(lm.n_heads)
    ]
    for prefix in ("", "repeated_"):
        shares = table[[f"{prefix}attention_{slot}" for slot in SLOTS]].to_numpy()
        assert shares.sum(1) == pytest.approx(np.ones(len(table)), abs=1e-5)
        roles = [SLOTS[row.argmax()] for row in shares]
        assert table[f"{prefix}role_attention"].tolist() == roles
        busy = [SLOTS[1 + row[1:].argmax()] for row in shares]
        assert table[f"{prefix}role_attention_besides_bos"].tolist() == busy
        first, second = np.sort(shares)[:, :-3:-1].T
        assert table[f"{prefix}near_tie"].tolist() == (first - second < 0.1).tolist()
    errors = [name for name in table if name.endswith("_se")]
    measured = errors if which == "gpt2" else [name for name in errors if "_CE" not in name and "_KL" not in name]
    assert table[measured].notna().all().all()
    assert all(name.removesuffix("_se") in table for name in errors)
    assert set(np.concatenate([*table["query_ids"], *table["key_ids"]])) - {-1} <= set(found.strings)
    for pictures in found.patterns.values():
        assert len(pictures) == len(table)
    meta = found.meta
    assert meta["n_tokens"] == 9 * 23 and meta["n_contexts"] == 9 and meta["repeated_tokens"] == 7 * 11
    assert 0 < meta["n_documents"] <= 9 * 2
    assert sum(meta["slots_by_chance"].values()) == pytest.approx(1)


def test_removal_stands_in_the_table_or_not(out, gpt2_folder, llama_folder):
    with_, without = (ModelHeads(out / f"{folder.name}.heads") for folder in (gpt2_folder, llama_folder))
    for name in (*ABLATIONS, "repeated_zero"):
        assert with_.heads[[f"{name}_CE", f"{name}_CE_se", f"{name}_KL", f"{name}_KL_se"]].notna().all().all()
        assert f"{name}_CE" not in without.heads
    assert with_.heads["zero_KL"].max() > 0.001
    assert without.meta["removal"] is None
    assert with_.meta["removal"]["contexts"] == 3 and with_.meta["removal"]["tokens"] == 3 * 22


def test_the_end_is_a_table_of_the_strongest(out, gpt2_folder, text_file, tmp_path, capsys):
    assert main(arguments(gpt2_folder, text_file, tmp_path, "--removal_tokens=0")) == 0
    found = ModelHeads(tmp_path / f"{gpt2_folder.name}.heads")
    best = found.strongest("induction", 1).iloc[0]
    printed = capsys.readouterr().out
    for name in ("previous-token", "induction", "duplicate-token"):
        assert name in printed
    assert f"{best.layer:.0f}.{best['head']:.0f} {best.score:.2f} ± {best.se:.2f}" in printed


def test_models_are_listed_and_are_no_checkpoints(out, copied, gpt2_folder):
    readable, errors = list_models(out)
    assert len(readable) == 2 and not errors
    assert list_checkpoints(out) == ([], [])
    (copied / "meta.json").write_text("{")
    readable, errors = list_models(copied.parent)
    assert not readable and len(errors) == 1
    assert str(errors[0]).endswith(f"run `python -m analysis.heads {gpt2_folder.name} --out={copied.parent}`")
    assert list_models(out / "nowhere") == ([], [])


def change(column, value):
    def changed(folder):
        table = pd.read_parquet(folder / "heads.parquet")
        table[column] = [value] * len(table)
        table.to_parquet(folder / "heads.parquet")

    return changed


DAMAGE = {
    "share above 1": (change("attention_bos", 1.5), "heads", r"column attention_bos has \[1.5\]"),
    "negative error": (change("copying_se", -0.1), "heads", "column copying_se has"),
    "negative KL": (change("resample_KL", -0.5), "heads", "column resample_KL has"),
    "infinite": (change("zero_CE", np.inf), "heads", r"column zero_CE has \[inf\]"),
    "empty share": (change("repeated_attention_induction", None), "heads", "repeated_attention_induction has empty"),
    "no slot": (change("role_attention", "nobody"), "heads", "no source slot"),
    "head too large": (change("head", 4), "heads", "column head has"),
    "not sorted": (change("layer", 0), "heads", "not in their order"),
    "text for a number": (change("distance", "far"), "heads", "column distance is .*string"),
    "no table": (lambda f: (f / "heads.parquet").unlink(), "heads", "heads.parquet is missing"),
    "no patterns": (lambda f: (f / "patterns.parquet").write_bytes(b"PAR1"), "patterns", "patterns.parquet is damaged"),
    "no tokens": (lambda f: (f / "tokens.parquet").unlink(), "strings", "tokens.parquet is missing"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "heads", "does not describe the heads of a model yet"),
    "version": (
        lambda f: edit_json(f / "meta.json", schema_version=9),
        "heads",
        "schema version 9, this program reads 1",
    ),
    "other sizes": (lambda f: edit_json(f / "meta.json", model={"name": "x"}), "heads", "meta.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_sentence(case, copied):
    damage, asked, message = DAMAGE[case]
    damage(copied)
    with pytest.raises(CheckpointError, match=message) as error:
        getattr(ModelHeads(copied), asked)
    assert "python -m analysis.heads" in error.value.command
    assert "\n" not in str(error.value)


def test_a_row_too_few_is_one_sentence(copied):
    table = pd.read_parquet(copied / "heads.parquet")
    table.iloc[:-1].to_parquet(copied / "heads.parquet")
    with pytest.raises(CheckpointError, match="23 rows, not 24"):
        _ = ModelHeads(copied).heads


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("no-such-model", (), "unknown model 'no-such-model'"),
        ("./nowhere", (), "there is no model folder"),
        (None, ("--tokens=0",), "tokens must be 1 or more"),
        (None, ("--removal_tokens=-1",), "removal_tokens must be 0 or more"),
        (None, ("--dataset=/nowhere/text.txt",), "nowhere/text.txt"),
        (None, ("--context_size=999",), "context_size 999 exceeds"),
        (None, ("--device=toaster",), "device 'toaster' cannot be used"),
    ],
)
def test_what_cannot_be_is_one_sentence(model, more, message, gpt2_folder, text_file, tmp_path, capsys):
    assert main([*arguments(model or gpt2_folder, text_file, tmp_path), *more]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and message in said
    assert list(tmp_path.iterdir()) == []


def test_another_model_of_that_name_is_not_replaced(copied, gpt2_folder, text_file, capsys):
    meta = json.loads((copied / "meta.json").read_text())
    edit_json(copied / "meta.json", model=meta["model"] | {"name": "/elsewhere/gpt2", "fingerprint": "0"})
    before = (copied / "meta.json").read_bytes()
    assert main(arguments(gpt2_folder, text_file, copied.parent)) == 2
    assert "describes another model of that name: choose another folder with --out" in capsys.readouterr().err
    assert (copied / "meta.json").read_bytes() == before


def test_a_damaged_folder_is_made_anew(copied, gpt2_folder, text_file):
    (copied / "meta.json").write_bytes(b"\0")
    assert main(arguments(gpt2_folder, text_file, copied.parent, "--removal_tokens=0")) == 0
    assert ModelHeads(copied).heads.shape[0] == 24


def test_stopped_it_leaves_what_was_there(copied, gpt2_folder, text_file, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    before = {file.name: file.read_bytes() for file in copied.iterdir()}
    monkeypatch.setattr(run, "remove", stop)
    assert main(arguments(gpt2_folder, text_file, copied.parent)) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in copied.iterdir()} == before
    assert [file.name for file in copied.parent.iterdir()] == [copied.name]


def test_it_runs_in_one_process(gpt2_folder, text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trainer.ranks.says", lambda *args, **kwargs: True)
    assert main(arguments(gpt2_folder, text_file, tmp_path)) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_the_same_seed_gives_the_same(out, gpt2_folder, text_file, tmp_path):
    assert main(arguments(gpt2_folder, text_file, tmp_path)) == 0
    ours, again = (ModelHeads(each / f"{gpt2_folder.name}.heads").heads for each in (out, tmp_path))
    numbers = ours.select_dtypes("number").columns
    assert np.allclose(ours[numbers], again[numbers], atol=1e-5)
