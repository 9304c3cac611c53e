"""NAME.pt beside NAME_cfg.json, as Kissane et al. published them."""

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.imports.conftest import D_IN, D_SAE, HOOK, assert_close, centred, dense_weights
from trainer.checkpoint import Checkpoint

NAME = "gpt2-small_L1_Hcat_z_lr1.20e-03_l18.00e-01_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v5"


@pytest.fixture
def published(tmp_path, gpt2_folder) -> Path:
    """The pair of files, with the entries of their training script."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(dense_weights(), folder / f"{NAME}.pt")
    cfg = {
        "seed": 49, "batch_size": 4096, "lr": 0.0012, "l1_coeff": 0.8, "beta2": 0.9999, "dict_mult": 32,
        "seq_len": 128, "enc_dtype": "fp32", "model_name": str(gpt2_folder), "site": "z", "layer": 1,
        "device": "cuda", "head": "cat", "concat_heads": True, "act_name": HOOK, "act_size": D_IN, "dict_size": D_SAE,
    }  # fmt: skip
    (folder / f"{NAME}_cfg.json").write_text(json.dumps(cfg))
    return folder / f"{NAME}.pt"


def change(published: Path, **entries) -> None:
    file = published.with_name(f"{NAME}_cfg.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("named", ["file", "folder"])
def test_it_computes_what_they_wrote(named, published, tmp_path, text_file, run, z_by_convention):
    source = published if named == "file" else published.parent
    status, said = run(source, tmp_path / "ours", f"--dataset={text_file}")
    assert status == 0, said
    ours, z = Checkpoint(tmp_path / "ours"), z_by_convention[True]
    f, expected = centred(dense_weights(), z)
    assert_close(ours.sae.encode(z)[..., 0, :], f)
    assert_close(ours.sae(z), expected)
    assert ours.is_dense and ours.layer == 1
    imported = ours.config.imported
    assert (imported.source, imported.l1_coefficient, imported.fold_value_biases) == ("Kissane et al.", 0.8, True)
    assert ours.config.text.context_size == 128


def test_half_precision_is_read(published, tmp_path, text_file, run):
    weights = {name: p.bfloat16() for name, p in dense_weights().items()}
    torch.save(weights, published)
    assert run(published, tmp_path / "ours", f"--dataset={text_file}")[0] == 0
    norm = weights["W_dec"].float().norm(dim=-1)
    assert_close(Checkpoint(tmp_path / "ours").sae.W_enc[0], weights["W_enc"].float() * norm)


REFUSED = {
    "text": ({}, [], "name one with --dataset"),
    "model": ({"model_name": None}, ["--dataset=x"], "name it with --model"),
    "other hook": ({"act_name": "blocks.1.mlp.hook_post"}, [], "it reads blocks.1.mlp.hook_post"),
    "other sizes": ({"dict_size": 10**12}, [], "its W_enc is [32, 20], but its configuration describes [32, 1000000"),
    "one head": ({"act_size": 8}, [], "its W_enc is [32, 20], but its configuration describes [8, 20]"),
    "no size": ({"dict_size": None}, [], "$.dict_size"),
    "NaN": ({"act_size": float("nan")}, [], "$.act_size"),
    "a size in words": ({"act_size": "768"}, [], "$.act_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_be_is_one_sentence(case, published, tmp_path, run):
    entries, options, sentence = REFUSED[case]
    change(published, **entries)
    status, said = run(published, tmp_path / "new" / "ours", *options)
    assert (status, said.strip().count("\n")) == (2, 0)
    assert sentence in said
    assert list((tmp_path / "new").iterdir()) == []


def test_one_of_several_is_named(published, tmp_path, run):
    (published.parent / "other_cfg.json").write_text("{}")
    assert "it holds 2 SAEs: name one" in run(published.parent, tmp_path / "ours")[1]


def test_a_missing_half_is_named(published, tmp_path, run):
    published.unlink()
    assert f"{NAME}.pt is missing" in run(published.parent, tmp_path / "ours")[1]
    published.write_bytes(b"")
    published.with_name(f"{NAME}_cfg.json").unlink()
    assert f"{NAME}_cfg.json is missing" in run(published, tmp_path / "ours")[1]
