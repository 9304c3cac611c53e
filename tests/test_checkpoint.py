"""The checkpoint directory round-trips, and a broken one is refused by the name of the broken file."""

import json
import os

import pytest
import torch

from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import CheckpointError

SIZES = {"n_heads": 2, "d_head": 4, "features_per_head": 6, "activation": "topk", "k": 3, "k_scope": "head"}
CONFIG = {
    "status": "complete",
    "recipe": "april",
    "block": "head",
    "model": {"name": "toy", "hook_layer": 0, "n_heads": 2, "d_head": 4},
    "text": {"name": "toy"},
    "training": {},
}


@pytest.fixture
def saved(tmp_path):
    sae = BlockDiagSAE(2, 4, 6, "topk", k=3)
    checkpoint.save(tmp_path / "good", sae, CONFIG)
    return tmp_path / "good", sae


def test_round_trip(saved):
    path, sae = saved
    loaded, config = checkpoint.load(path)
    z = torch.randn(5, 2, 4)
    assert all(torch.equal(*pair) for pair in zip(loaded.parameters(), sae.parameters(), strict=True))
    assert torch.allclose(loaded(z), sae(z), atol=1e-6)
    assert (loaded.n_heads, loaded.d_head, loaded.features_per_head, loaded.k) == (2, 4, 6, 3)
    assert config["schema_version"] == checkpoint.SCHEMA_VERSION
    assert config["versions"]["torch"] and config["recipe"] == "april"
    assert not list(path.glob(".*")), "no partial file is left"


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda p: (p / "config.json").unlink(), "config.json is missing"),
        (lambda p: (p / "config.json").write_text('{"schema'), "config.json is damaged"),
        (lambda p: edit_config(p, schema_version=99), "config.json has schema version 99"),
        (lambda p: edit_config(p, sae={"n_heads": 2}), "config.json does not describe an SAE"),
        (lambda p: (p / "sae.safetensors").unlink(), "sae.safetensors is missing"),
        (lambda p: os.truncate(p / "sae.safetensors", 100), "sae.safetensors is damaged"),
        (lambda p: edit_config(p, sae={**SIZES, "n_heads": 3}), "sae.safetensors holds"),
    ],
    ids=["no config", "half config", "schema", "no sizes", "no weights", "half weights", "disagree"],
)
def test_a_broken_checkpoint_is_refused_by_file_and_the_others_stay(saved, breaks, message):
    path, sae = saved
    checkpoint.save(path.parent / "other", sae, CONFIG)
    breaks(path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)
    listed = {each.path.name: each for each in checkpoint.list_checkpoints(path.parent)}
    assert listed["other"].config and not listed["other"].error
    if "weights" not in message and "holds" not in message and "damaged" not in message:
        assert message.split()[0] in (listed["good"].error or message)


def test_listing_names_the_reason(saved):
    path, _ = saved
    (path / "sae.safetensors").unlink()
    (listed,) = checkpoint.list_checkpoints(path.parent)
    assert listed.config is None and "sae.safetensors is missing" in listed.error
    assert checkpoint.list_checkpoints(path.parent / "nowhere") == []


def test_weights_that_are_not_finite_are_refused(saved):
    path, sae = saved
    sae.W_dec.data[0, 0, 0] = float("nan")
    checkpoint.save(path, sae, CONFIG)
    with pytest.raises(CheckpointError, match="not finite"):
        checkpoint.load(path)


def test_a_metrics_line_that_is_still_being_written_is_left_out(saved):
    path, _ = saved
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in checkpoint.load_metrics(path)] == [1, 2]


def test_a_failed_write_leaves_the_old_file(saved):
    path, _ = saved
    before = (path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint.write_json(path / "config.json", {"loss": float("nan")})
    assert (path / "config.json").read_bytes() == before and not list(path.glob(".*"))
