"""The checkpoint directory round-trips, and a broken one is refused by the name of the broken file."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import trainer
from tests.helpers import ROOT, config_of, edit_config, spoil
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


def test_a_bad_directory_of_any_kind_is_one_sentence(trained, tmp_path):
    names = spoil(tmp_path, trained / "topk")
    shutil.copytree(trained / "topk", tmp_path / "good")
    readable, errors = checkpoint.list_checkpoints(tmp_path)
    assert [each.name for each in readable] == ["good"] and len(errors) == len(names)
    for name in names:
        (sentence,) = (str(error) for error in errors if f"{tmp_path}/{name}/" in f"{error} ".replace(" ", "/ "))
        assert sentence.isprintable() and len(sentence) < 500 and sentence.encode()


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float64])
def test_weights_of_another_type_are_refused(saved, dtype):
    path, sae = saved
    save_file({name: tensor.to(dtype) for name, tensor in sae.state_dict().items()}, path / "sae.safetensors")
    with pytest.raises(CheckpointError, match="not one of F32, F16, BF16"):
        _ = Checkpoint(path).sae


@pytest.mark.parametrize(
    "figures",
    [
        {"n_tokens": "9"}, {"n_tokens": 0}, {"L0": None}, {"L0_per_head": [1.0]}, {"FVU_per_head": [[1.0]]},
        {"L0_histogram_per_head": [[0, 0]] * 4}, {"L0_se": -1.0}, {"induction": None},
        {"n_tokens": 10**40}, {"silent_fraction": -0.5}, {"schema_version": 3}, {"FVU_per_head_se": [0.1]},
    ],
    ids=str,
)  # fmt: skip
def test_figures_that_no_page_could_draw_are_refused(trained, tmp_path, figures):
    path = shutil.copytree(trained / "topk", tmp_path / "topk")
    whole = json.loads((path / "eval.json").read_text())
    (path / "eval.json").write_text(json.dumps({**whole, "unknown": 1}))
    assert Checkpoint(path).eval == {**whole, "unknown": 1}, "what is not known is kept"
    (path / "eval.json").write_text(json.dumps({**whole, **figures}))
    with pytest.raises(CheckpointError, match=r"eval.json is damaged"):
        _ = Checkpoint(path).eval


def test_an_evaluation_of_before_is_read_without_its_errors_over_tokens(trained, tmp_path):
    """They were too small; what was called dead is silent."""
    path = shutil.copytree(trained / "topk", tmp_path / "topk")
    now = json.loads((path / "eval.json").read_text())

    def before(figures):
        kept = {key.replace("silent_", "dead_"): value for key, value in figures.items() if "bias" not in key}
        return {key: value for key, value in kept.items() if not key.startswith(("n_contexts", "norm", "schema"))}

    old = before(now) | {"induction": before(now["induction"])}
    (path / "eval.json").write_text(json.dumps(old))
    found = Checkpoint(path).eval
    for figures, whole in ((found, now), (found["induction"], now["induction"])):
        assert figures["silent_fraction"] == whole["silent_fraction"] and figures["L0"] == whole["L0"]
        assert figures["CE_score"] == whole["CE_score"]
        assert not any(key.endswith("_se") or "dead" in key for key in figures)


@pytest.mark.parametrize(
    "line", ['{"step": "1"}', '{"L0": 1}', '{"step": 1, "L0": [1]}', '{"step": 1, "x": "y"}', "[" * 9999]
)
def test_a_line_that_holds_no_figures_is_refused_by_its_number(saved, line):
    path, _ = saved
    (path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged .* \(line 2\)"):
        checkpoint.read_metrics(path)


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
    """A config.json that version 0.1 wrote, against that of the same checkpoint today."""
    data, now = ROOT / "tests" / "data" / "schema2", tmp_path / "now"
    now.mkdir()
    shutil.copy(data / "config.json", tmp_path)
    shutil.copy(data / "today.json", now / "config.json")
    sae = BlockDiagSAE(1, 576, 2304, "jumprelu")
    for path in (tmp_path, now):
        save_file({name: tensor.detach() for name, tensor in sae.named_parameters()}, path / "sae.safetensors")
    old, new = Checkpoint(tmp_path), Checkpoint(now)
    assert old.config == new.config
    assert old.config.options is not None and old.config.options.sae.k == 32 and old.is_dense
    assert (old.recipe, old.sparsity, old.site) == ("batchtopk (dense)", "k 32", "smollm2-135m layer 17")
    z = torch.randn(3, 9, 64)
    assert torch.equal(old.sae(z), new.sae(z))
    edit_config(
        tmp_path, imported_from="SAELens gated", training={"recipe": "gated", "k": None, "label": "SAELens gated"}
    )
    imported = Checkpoint(tmp_path)
    assert imported.config.options is None and imported.recipe == "SAELens gated (dense)" and imported.sparsity == ""
