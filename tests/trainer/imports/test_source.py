"""Names of the Hugging Face hub and of SAELens' table, from a local cache; what the hub answers is made here."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from tests.trainer.imports.conftest import D_IN, D_SAE, HOOK, assert_close, dense_weights
from trainer.checkpoint import Checkpoint
from trainer.imports.source import read

CFG = {"d_in": D_IN, "d_sae": D_SAE, "hook_name": HOOK, "sae_lens_training_version": "3.5.0"}
RELEASE, KISSANE = "gpt2-small-hook-z-kk", "ckkissane/attn-saes-gpt2-small-all-layers"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, which nothing is downloaded into; `cache(repo)` is the folder of a repository's files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def repository(repo: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return folder / "snapshots" / ("0" * 40)

    return repository


@pytest.fixture
def theirs(save_folder):
    return lambda folder, **entries: save_folder(folder, CFG | entries, dense_weights())


@pytest.mark.parametrize("within", ["", ":layer_1", ":saes/layer_1/"])
def test_a_folder_of_a_repository(within, cache, theirs, tmp_path, run):
    theirs(cache("owner/saes") / within.strip(":/"))
    status, said = run(f"owner/saes{within}", tmp_path / "ours")
    assert status == 0, said
    norm = dense_weights()["W_dec"].norm(dim=-1)
    assert_close(Checkpoint(tmp_path / "ours").sae.W_enc[0], dense_weights()["W_enc"] * norm)


@pytest.mark.parametrize("by", ["release", "repository"])
def test_kissane_by_name(by, cache, gpt2_folder, text_file, tmp_path, run):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    name = get_pretrained_saes_directory()[RELEASE].saes_map["blocks.1.hook_z"]
    folder = cache(KISSANE)
    folder.mkdir(parents=True)
    torch.save(dense_weights(), folder / name)
    cfg = {"act_name": HOOK, "act_size": D_IN, "dict_size": D_SAE, "model_name": "gpt2-small", "l1_coeff": 0.8}
    (folder / name.replace(".pt", "_cfg.json")).write_text(json.dumps(cfg))
    source = f"{RELEASE}/blocks.1.hook_z" if by == "release" else f"{KISSANE}:{name}"
    status, said = run(source, tmp_path / "ours", f"--model={gpt2_folder}", f"--dataset={text_file}")
    assert status == 0, said
    imported = Checkpoint(tmp_path / "ours").config.imported
    assert (imported.source, imported.l1_coefficient) == ("Kissane et al.", 0.8)


def release(monkeypatch, conversion: str | None, **scale: float) -> None:
    """A release of one SAE, in SAELens' table."""
    from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup, get_pretrained_saes_directory

    entry = PretrainedSAELookup(
        release="tiny", repo_id="owner/saes", model="gpt2", conversion_func=conversion, saes_map={"a/b": "layer_1"},
        expected_var_explained={}, expected_l0={}, neuronpedia_id={}, norm_scaling_factor={"a/b": 1.7} if scale else {},
        config_overrides={"context_size": 8},
    )  # fmt: skip
    monkeypatch.setitem(get_pretrained_saes_directory(), "tiny", entry)


def test_an_sae_of_the_table_has_its_scale_and_corrections(cache, theirs, monkeypatch):
    release(monkeypatch, None, scale=1.7)
    theirs(cache("owner/saes") / "layer_1", normalize_activations="expected_average_only_in")
    found = read("tiny/a/b")
    assert (found.scale, found.context_size) == (1.7, 8)
    with pytest.raises(ValueError, match="has a/b and so on, not 'c'"):
        read("tiny/c")


def test_what_another_program_saved_is_read_by_saelens(monkeypatch):
    from sae_lens.loading import pretrained_sae_loaders as loaders

    release(monkeypatch, "of_a_test")
    cfg, loaded = CFG | {"architecture": "jumprelu"}, []

    def load(*arguments):
        loaded.append(arguments[:2])
        return cfg, {name: p.bfloat16() for name, p in dense_weights().items()} | {"threshold": torch.ones(D_SAE)}, None

    monkeypatch.setitem(loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS, "of_a_test", lambda *arguments: cfg)
    monkeypatch.setitem(loaders.NAMED_PRETRAINED_SAE_LOADERS, "of_a_test", load)
    assert read("tiny/a/b").W_enc.dtype == torch.float32
    assert loaded == [("owner/saes", "layer_1")]
    cfg["hook_name"] = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match=r"it reads blocks\.1\.hook_resid_post"):
        read("tiny/a/b")
    assert len(loaded) == 1  # no weights are fetched of what cannot be expressed


def test_gemma_scope_reads_head_outputs():
    from sae_lens.loading.pretrained_sae_loaders import get_gemma_2_config_from_hf

    from trainer.imports.saelens import expressible

    cfg = get_gemma_2_config_from_hf("google/gemma-scope-2b-pt-att", "layer_3/width_16k/average_l0_80", "cpu")
    described, metadata = expressible(cfg)
    assert (described.architecture, described.d_in, metadata.hook_name) == ("jumprelu", 2048, "blocks.3.attn.hook_z")
    assert not described.apply_b_dec_to_input


def test_weights_are_not_fetched_of_what_cannot_be_expressed(cache, theirs, monkeypatch):
    folder = theirs(cache("owner/saes"), hook_name="blocks.1.hook_mlp_out")
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(ValueError, match=r"it reads blocks\.1\.hook_mlp_out"):
        read("owner/saes")


ANSWERS = {
    "gated": (GatedRepoError, "owner/saes is gated on the Hugging Face hub: accept its terms"),
    "no repository": (RepositoryNotFoundError, "the Hugging Face hub has no repository owner/saes"),
    "no file": (EntryNotFoundError, "owner/saes has no file cfg.json"),
    "no network": (
        LocalEntryNotFoundError,
        "cfg.json of owner/saes is not in the cache and the Hugging Face hub cannot",
    ),
    "no name": (HFValidationError, "cfg.json of owner/saes could not be downloaded: one line"),
    "full disk": (OSError, "cfg.json of owner/saes could not be downloaded: one line"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_hub_answers_is_one_sentence(answer, monkeypatch, tmp_path, run):
    kind, sentence = ANSWERS[answer]

    def download(repo: str, name: str) -> str:
        error = kind.__new__(kind, "\none line\nanother")
        error.args = ("\none line\nanother",)
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    status, said = run("owner/saes", tmp_path / "ours")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert sentence in said


def test_without_network_what_is_not_in_the_cache_is_said(cache, tmp_path, run):
    cache("owner/saes")
    for source in ("owner/saes", "owner/other:folder", f"{RELEASE}/blocks.1.hook_z"):
        status, said = run(source, tmp_path / "ours")
        assert (status, said.strip().count("\n")) == (2, 0)
        assert "is not in the cache and the Hugging Face hub cannot be reached" in said


@pytest.mark.parametrize("source", ["/no/such/folder", "./none", "none", "a/b/c", "", "x.pt", "https://x.org/a", "a:b"])
def test_what_is_nothing_is_one_sentence(source, cache, tmp_path, run):
    status, said = run(source, tmp_path / "ours")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert said.startswith("error: ")


def test_a_file_of_another_kind(tmp_path, run):
    (tmp_path / "x.safetensors").write_bytes(b"")
    assert "it is no folder and no .pt file" in run(tmp_path / "x.safetensors", tmp_path / "ours")[1]
