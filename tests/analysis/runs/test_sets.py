"""Which checkpoints are one SAE on several layers, and the table of a model's heads made of them."""

import json
import shutil

import pytest

from analysis.runs.model import columns_of, head_table, roles_of
from analysis.runs.sets import counterpart, layer_sets
from tests.helpers import edit_config, edit_json, tiny_run
from trainer.checkpoint import Checkpoint, list_checkpoints


@pytest.fixture(scope="session")
def layers(tmp_path_factory, gpt2_folder, text_file):
    """One recipe on three layers, and on one of them another."""
    from trainer.__main__ import main

    folder = tmp_path_factory.mktemp("layers")
    more = ("--total_training_steps=4", "--batch_size=64", "--eval_tokens=62", "--cache_gb=0", "--name=tiny")
    assert main(tiny_run(gpt2_folder, text_file, folder, *more, "--hook_layer=0-2", "--k=5")) == 0
    assert main(tiny_run(gpt2_folder, text_file, folder, *more[:-1], "--name=other", "--l1_coefficients=1")) == 0
    return folder


@pytest.fixture
def checkpoints(layers, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(layers, folder)
    return folder


def test_a_set_is_what_differs_only_in_its_layer(checkpoints):
    readable = list_checkpoints(checkpoints).readable
    whole, alone = layer_sets(readable)
    assert (whole.name, list(whole.members)) == ("tiny-batchtopk-x4-k5", [0, 1, 2])
    assert (alone.name, list(alone.members)) == ("other", [1])
    there = [each for each in readable if each.layer == 1]
    assert counterpart(whole.members[0], there) == whole.members[1]
    assert counterpart(alone.members[1], [whole.members[0]]) is None

    shutil.copytree(whole.members[2].path, checkpoints / "copy")
    config = json.loads((whole.members[0].path / "config.json").read_text())
    options = config["options"] | {"training": config["options"]["training"] | {"seed": 1}}
    edit_config(whole.members[0].path, options=options)
    sets = layer_sets(list_checkpoints(checkpoints).readable)
    assert list(sets[0].members) == [1, 2]
    assert sorted(list(each.members) for each in sets[1:]) == [[0], [1], [2]], (
        "another seed, and a copy, are other sets"
    )
    assert sum(len(each.members) for each in sets) == 5


def test_a_set_with_a_missing_and_a_broken_layer_is_shown_with_the_rest(checkpoints):
    of_set = layer_sets(list_checkpoints(checkpoints).readable)[0]
    (of_set.members[0].path / "analysis").mkdir()
    del of_set.members[1]
    edit_json(of_set.members[2].path / "eval.json", L0_per_head=[1.0, 2.0, 3.0, 4.0])
    of_set.members[2].__dict__.pop("eval", None)
    table, (error,) = head_table(None, of_set)
    assert table["name"].tolist() == [f"{layer}.{head}" for layer in (0, 2) for head in range(4)]
    assert table.loc[table["layer"] == 2, "L0"].tolist() == [1, 2, 3, 4]
    assert "has no analysis yet" in str(error)
    (of_set.members[2].path / "eval.json").write_text("{")
    of_set.members[2] = Checkpoint(of_set.members[2].path)
    table, errors = head_table(None, of_set)
    assert len(errors) == 2 and table.loc[table["layer"] == 2, "L0"].isna().all()
    assert table.loc[table["layer"] == 0, "L0"].notna().all()
    assert {"L0", "FVU"} <= columns_of(table).keys() and not roles_of(table)


def test_without_anything_the_table_is_empty():
    table, errors = head_table(None, None)
    assert table.empty and not errors and not columns_of(table)
