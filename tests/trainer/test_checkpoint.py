"""The checkpoint directory round-trips, and a broken one is refused by the name of the broken file."""

import os
import shutil
from dataclasses import replace

import pytest
import torch

import trainer
from tests.helpers import ROOT, config_of, edit_config
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.files import write_json

SIZES = {"n_blocks": 2, "width": 4, "features_per_block": 6, "activation": "topk", "k": 3, "k_scope": "head"}


@pytest.fixture
def saved(tmp_path):
    sae = BlockDiagSAE(2, 4, 6, "topk", k=3)
    checkpoint.save(tmp_path / "good", sae, config_of(sae))
    return tmp_path / "good", sae


def test_round_trip(saved):
    path, sae = saved
    saved = Checkpoint(path)
    loaded = saved.sae
    z = torch.randn(5, 2, 4)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), sae.parameters(), strict=True))
    assert torch.allclose(loaded(z), sae(z), atol=1e-6)
    assert (loaded.n_blocks, loaded.width, loaded.features_per_block, loaded.k) == (2, 4, 6, 3)
    assert replace(saved.config, versions={}) == config_of(sae)
    assert saved.config.versions["torch"] and saved.config.versions["attn-saes"] == trainer.__version__
    assert (saved.recipe, saved.sparsity, saved.site) == ("april", "k 7", "toy layer 0")
    assert not saved.is_dense and saved.is_complete and saved.eval is None and saved.metrics() == []
    assert not list(path.glob(".*")), "no partial file is left"


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "config.json").write_text('{"schema'), "config.json is damaged"),
        (lambda p: edit_config(p, schema_version=99), "config.json has schema version 99"),
        (lambda p: edit_config(p, sae={"n_blocks": 2}), "config.json does not describe an SAE"),
        (lambda p: (p / "sae.safetensors").unlink(), "sae.safetensors is missing"),
        (lambda p: os.truncate(p / "sae.safetensors", 100), "sae.safetensors is damaged"),
        (lambda p: edit_config(p, sae={**SIZES, "features_per_block": 5}), r"sae.safetensors holds W_dec \[2, 6, 4\]"),
        (lambda p: edit_config(p, sae={**SIZES, "n_blocks": 3}), "config.json does not describe an SAE: 3 blocks"),
    ],
    ids=["no config", "half config", "schema", "no sizes", "no weights", "half weights", "disagree", "no such layer"],
)
def test_a_broken_checkpoint_is_refused_by_file_and_the_others_stay(saved, breaks, message):
    path, sae = saved
    checkpoint.save(path.parent / "other", sae, config_of(sae))
    breaks(path)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(path).sae
    readable, errors = checkpoint.list_checkpoints(path.parent)
    assert [each.name for each in readable] == ["other"]
    assert len(errors) == 1 and str(errors[0].reason).startswith(str(path))


def test_listing_names_the_reason(saved):
    path, _ = saved
    (path / "sae.safetensors").unlink()
    readable, (error,) = checkpoint.list_checkpoints(path.parent)
    assert not readable and "sae.safetensors is missing" in str(error)
    assert checkpoint.list_checkpoints(path.parent / "nowhere") == ([], [])


def test_weights_that_are_not_finite_are_refused(saved):
    path, sae = saved
    sae.W_dec.data[0, 0, 0] = float("nan")
    checkpoint.save(path, sae, config_of(sae))
    with pytest.raises(CheckpointError, match="not finite"):
        _ = Checkpoint(path).sae


def test_a_metrics_line_that_is_still_being_written_is_left_out(saved):
    path, _ = saved
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in checkpoint.read_metrics(path)] == [1, 2]


def test_a_failed_write_leaves_the_old_file(saved):
    path, _ = saved
    before = (path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path / "config.json", {"loss": float("nan")})
    assert (path / "config.json").read_bytes() == before and not list(path.glob(".*"))


def test_a_directory_of_schema_2_says_the_same(tmp_path):
    """A config.json that version 0.1 wrote, against the same checkpoint as it is shipped today."""
    shipped = ROOT / "checkpoints" / "smollm2-135m-L17-batchtopk-dense-x4-k32"
    shutil.copy(ROOT / "tests" / "data" / "schema2" / "config.json", tmp_path)
    for name in ("sae.safetensors", "eval.json", "metrics.jsonl"):
        shutil.copy(shipped / name, tmp_path)
    old, new = Checkpoint(tmp_path), Checkpoint(shipped)
    assert old.config == new.config
    assert old.config.options is not None and old.config.options.sae.k == 32 and old.is_dense
    assert (old.recipe, old.sparsity, old.site) == ("batchtopk (dense)", "k 32", "smollm2-135m layer 17")
    z = torch.randn(3, 9, 64)
    assert torch.equal(old.sae(z), new.sae(z)) and old.eval == new.eval
    edit_config(
        tmp_path, imported_from="SAELens gated", training={"recipe": "gated", "k": None, "label": "SAELens gated"}
    )
    imported = Checkpoint(tmp_path)
    assert imported.config.options is None and imported.recipe == "SAELens gated (dense)" and imported.sparsity == ""
