"""Folders as the versions of SAELens wrote them, and the reference's fork."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.trainer.imports.conftest import D_IN, D_SAE, HOOK, assert_close, centred, dense_weights, random_weights
from trainer.checkpoint import Checkpoint
from trainer.imports.saelens import trained

FLAT = {"hook_name": HOOK, "hook_head_index": None, "activation_fn_str": "relu", "normalize_activations": "none"}
VERSIONS = {  # cfg.json, and whether the model it was trained on had its value biases folded
    "2.1": ({"hook_point": HOOK, "hook_point_head_index": None, "hook_point_layer": 1, "activation_fn": "relu",
             "normalize_activations": False, "model_from_pretrained_kwargs": {},
             "sae_lens_training_version": "2.1.3"}, True),
    "1.0": ({"hook_point": HOOK, "hook_point_head_index": None, "dtype": "torch.float32"}, True),
    "3.0": (FLAT | {"sae_lens_training_version": "3.0.0"}, True),
    "3.19.1": (FLAT | {"sae_lens_training_version": "3.19.1", "model_from_pretrained_kwargs": {}}, True),
    "3.19.2": (FLAT | {"sae_lens_training_version": "3.19.2",
                       "model_from_pretrained_kwargs": {"center_writing_weights": False}}, False),
    "3.19.1, unfolded": (FLAT | {"sae_lens_training_version": "3.19.1",
                                 "model_from_pretrained_kwargs": {"fold_value_biases": False}}, False),
    "5.10": (FLAT | {"sae_lens_training_version": "5.10.0", "model_from_pretrained_kwargs": {}}, False),
    "5.10, folded": (FLAT | {"sae_lens_training_version": "5.10.0",
                             "model_from_pretrained_kwargs": {"fold_ln": True, "fold_value_biases": True}}, True),
    "6.0": ({"metadata": {"hook_name": HOOK, "sae_lens_training_version": "6.0.0-rc.3",
                          "model_from_pretrained_kwargs": {"center_writing_weights": False}}}, False),
    "3.5, saved again by 6": ({"metadata": {"hook_name": HOOK, "sae_lens_version": "6.5.0",
                                            "sae_lens_training_version": "3.5.0"}}, True),
    "no version, options of 3.19.2": (
        FLAT | {"model_from_pretrained_kwargs": {"center_writing_weights": False}}, False),
    "no version": (FLAT, None),
    "no version, saved again by 6": ({"metadata": {"hook_name": HOOK, "sae_lens_version": "6.5.0",
                                                   "sae_lens_training_version": None}}, None),
    "a version in words": (FLAT | {"sae_lens_training_version": "main"}, None),
}  # fmt: skip
SIZES = {"d_in": D_IN, "d_sae": D_SAE}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_value_biases_are_those_of_the_version(version):
    cfg, folds = VERSIONS[version]
    found = trained(SIZES | cfg, dense_weights())
    assert found.folds_value_biases is folds
    assert (found.layer, found.source, found.scale) == (1, "SAELens standard", 1.0)


@pytest.mark.parametrize("version", ["2.1", "3.19.1", "3.19.2", "6.0"])
def test_activations_are_those_on_the_z_of_the_version(
    version, save_folder, tmp_path, run, z_by_convention, gpt2_folder, text_file
):
    cfg, folds = VERSIONS[version]
    theirs = save_folder(tmp_path / "theirs", cfg, dense_weights())
    status, said = run(theirs, tmp_path / "ours", f"--model={gpt2_folder}", f"--dataset={text_file}")
    assert status == 0, said
    ours, z = Checkpoint(tmp_path / "ours"), z_by_convention
    f, expected = centred(dense_weights(), z[folds])
    assert_close(ours.sae.encode(z[True])[..., 0, :], f)
    assert_close(ours.sae(z[True]) - z[True], expected - z[folds])
    assert ours.config.imported.fold_value_biases is folds


@pytest.mark.parametrize("folds", [True, False])
def test_an_unknown_convention_is_asked_for(folds, save_folder, tmp_path, run, z_by_convention):
    theirs = save_folder(tmp_path / "theirs", FLAT, dense_weights())
    status, said = run(theirs, tmp_path / "ours")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert "--fold_value_biases=true" in said
    assert run(theirs, tmp_path / "ours", f"--fold_value_biases={str(folds).lower()}")[0] == 0
    f, _ = centred(dense_weights(), z_by_convention[folds])
    assert_close(Checkpoint(tmp_path / "ours").sae.encode(z_by_convention[True])[..., 0, :], f)


def test_a_model_without_value_biases_needs_no_convention(save_folder, tmp_path, run, llama_folder):
    shapes = {"W_enc": (48, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, 48), "b_dec": (48,)}
    cfg = FLAT | {"model_name": str(llama_folder), "d_in": 48}
    theirs = save_folder(tmp_path / "theirs", cfg, random_weights(**shapes))
    status, said = run(theirs, tmp_path / "ours")
    assert status == 0, said


def use(found, x):
    """Activations and reconstruction of `Trained` on inputs [row, d_in] as they were in training."""
    pre = x @ found.W_enc + found.b_enc
    f = pre.relu() if found.threshold is None else torch.where(pre > found.threshold, pre, 0.0)
    return f, f @ found.W_dec + found.b_dec


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_the_scaling_factor_of_finetuning_is_in_the_decoder(name):
    factor = torch.rand(D_SAE) + 0.5
    p, x = dense_weights(), torch.randn(7, D_IN)
    found = trained(SIZES | FLAT | {"finetuning_scaling_factor": True}, p | {name: factor})
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    assert_close(use(found, x)[1], (f * factor) @ p["W_dec"] + p["b_dec"])
    with pytest.raises(ValueError, match="says that it has none"):
        trained(SIZES | FLAT | {"finetuning_scaling_factor": False}, p | {name: factor})
    assert torch.equal(trained(SIZES | FLAT, p | {name: torch.ones(D_SAE)}).W_dec, p["W_dec"])


def test_topk_was_an_activation_function_before_version_6():
    cfg = SIZES | FLAT | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    found = trained(cfg, dense_weights())
    assert (found.topk, found.source) == (3, "SAELens topk")
    for k in (None, 0, 2.5, "3"):
        with pytest.raises(ValueError, match="not a number of features"):
            trained(cfg | {"activation_fn_kwargs": {"k": k}}, dense_weights())


def test_a_threshold_in_logarithms():
    p = dense_weights() | {"log_threshold": torch.randn(D_SAE)}
    assert torch.equal(trained(SIZES | FLAT | {"architecture": "jumprelu"}, p).threshold, p["log_threshold"].exp())


def test_matryoshka_batchtopk_is_used_as_batchtopk():
    p = dense_weights() | {"topk_threshold": torch.tensor(0.3)}
    both = [trained(SIZES | FLAT | {"architecture": a, "k": 3}, p) for a in ("batchtopk", "matryoshka_batchtopk")]
    assert all(torch.equal(found.threshold, torch.full((D_SAE,), 0.3)) for found in both)


INEXPRESSIBLE = {
    "tanh-relu": ({"activation_fn_str": "tanh-relu"}, "its activation function is tanh-relu"),
    "gated topk": ({"architecture": "gated", "activation_fn_str": "topk"}, "its activation function is topk"),
    "transcoder": ({"architecture": "transcoder"}, "its architecture is transcoder"),
    "temporal": ({"architecture": "temporal"}, "its architecture is temporal"),
    "residual stream": ({"hook_name": "blocks.1.hook_resid_pre"}, "it reads blocks.1.hook_resid_pre"),
    "attention output": ({"hook_name": "blocks.1.hook_attn_out"}, "it reads blocks.1.hook_attn_out"),
    "no hook": ({"hook_name": None}, "it reads None"),
    "a head": ({"hook_head_index": 0}, "it reads head 0 only"),
    "layer norm": ({"normalize_activations": "layer_norm"}, "normalised (layer_norm)"),
    "each norm": ({"normalize_activations": "constant_norm_rescale"}, "normalised (constant_norm_rescale)"),
    "whitening": ({"normalize_activations": "covariance_whitening"}, "normalised (covariance_whitening)"),
    "rotated heads": (
        {"model_from_pretrained_kwargs": {"refactor_factored_attn_matrices": True}},
        "other dimensions than it has here",
    ),
    "a size in words": ({"d_sae": "20"}, "$.d_sae"),
    "no size": ({"d_in": None}, "$.d_in"),
    "no feature": ({"d_sae": 0}, "$.d_sae"),
    "too large": ({"d_sae": 10**15}, "its W_enc is [32, 20], but its configuration describes [32, 1000000000000000]"),
    "metadata in words": ({"metadata": "x"}, "its metadata is no object"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_cannot_be_expressed_is_one_sentence(case):
    entries, sentence = INEXPRESSIBLE[case]
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        trained(SIZES | FLAT | entries, dense_weights())
    assert "\n" not in str(error.value)


def test_weights_of_another_architecture_are_refused():
    with pytest.raises(ValueError, match="its weights lack threshold"):
        trained(SIZES | FLAT | {"architecture": "jumprelu"}, dense_weights())
    with pytest.raises(ValueError, match="its weights hold W_skip, which"):
        trained(SIZES | FLAT, dense_weights() | {"W_skip": torch.ones(3)})


def block_weights(n_heads: int = 4) -> dict[str, torch.Tensor]:
    """As nn.Linear of each head, [out, in]."""
    shapes = {}
    for head in range(n_heads):
        shapes |= {f"enc_blocks.{head}.weight": (5, 8), f"enc_blocks.{head}.bias": (5,),
                   f"dec_blocks.{head}.weight": (8, 5), f"dec_blocks.{head}.bias": (8,)}  # fmt: skip
    return random_weights(**shapes)


REFERENCE = FLAT | {"architecture": "block_diag", "n_heads": 4, "apply_b_dec_to_input": False,
                    "normalize_activations": "expected_average_only_in",
                    "sae_lens_training_version": "3.11.0"}  # fmt: skip


@pytest.mark.parametrize("normalize", ["global", "per_head", "none"])
def test_the_references_own_checkpoints(normalize, save_folder, tmp_path, run, z_by_convention, gpt2, monkeypatch):
    monkeypatch.setattr("trainer.imports.run._STATISTICS_ROWS", 1000)
    p = block_weights()
    theirs = save_folder(tmp_path / "theirs", REFERENCE, p)
    status, said = run(theirs, tmp_path / "ours")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert "the factor is lost: say --normalize=global" in said
    status, said = run(theirs, tmp_path / "ours", f"--normalize={normalize}")
    assert status == 0, said
    ours, z = Checkpoint(tmp_path / "ours"), z_by_convention[True]
    assert (ours.sae.n_blocks, ours.sae.width, ours.sae.features_per_block) == (4, 8, 5)
    assert (ours.config.imported.source, ours.config.imported.normalize) == ("SAELens block_diag", normalize)
    # Whatever was estimated is one factor, or one per head, and the SAE is theirs on z times it.
    contexts = torch.stack(list(ours.open_text(gpt2.tokenizer).train())[:63])
    rows = gpt2.layer(1).z(contexts).flatten(0, 1)
    scale = {
        "global": (32**0.5 / rows.flatten(1).norm(dim=-1).mean()).expand(4),
        "per_head": 8**0.5 / rows.norm(dim=-1).mean(0),
        "none": torch.ones(4),
    }[normalize]
    for head in range(4):
        W, b = p[f"enc_blocks.{head}.weight"], p[f"enc_blocks.{head}.bias"]
        f = torch.nn.functional.linear(z[..., head, :] * scale[head], W, b).relu()
        W, b = p[f"dec_blocks.{head}.weight"], p[f"dec_blocks.{head}.bias"]
        assert_close(ours.sae(z)[..., head, :], torch.nn.functional.linear(f, W, b) / scale[head])


@pytest.mark.parametrize("change", ["a missing bias", "a missing head", "a vector", "no blocks"])
def test_blocks_that_are_not_those_of_all_heads_are_refused(change):
    p = block_weights()
    if change == "a missing bias":
        del p["dec_blocks.2.bias"]
    elif change == "a missing head":
        p = {name: value for name, value in p.items() if ".1." not in name}
    elif change == "a vector":
        p["enc_blocks.1.weight"] = torch.ones(40)
    else:
        p = dense_weights()
    with pytest.raises(ValueError, match="its weights are not"):
        trained(SIZES | REFERENCE, p)


def test_the_scale_is_kept_with_the_activations_from_version_5_2_on(save_folder, tmp_path, run, z_by_convention):
    cfg = FLAT | {"normalize_activations": "expected_average_only_in", "sae_lens_training_version": "5.10.0"}
    theirs = save_folder(tmp_path / "theirs", cfg, dense_weights())
    kept = {"n_dataset_processed": torch.tensor(7), "estimated_norm_scaling_factor": torch.tensor(1.7)}
    save_file(kept, theirs / "activations_store_state.safetensors")
    status, said = run(theirs, tmp_path / "ours")
    assert status == 0, said
    z = z_by_convention
    _, expected = centred(dense_weights(), 1.7 * z[False])
    assert_close(Checkpoint(tmp_path / "ours").sae(z[True]) + z[False] - z[True], expected / 1.7)
    assert "leave out --normalize" in run(theirs, tmp_path / "again", "--normalize=global")[1]


@pytest.mark.parametrize("scale", [0, -1, float("nan"), float("inf"), "1", [1]])
def test_a_scale_that_is_none_is_refused(scale, save_folder, tmp_path, run):
    cfg = FLAT | {"normalize_activations": "expected_average_only_in", "sae_lens_training_version": "6.0.0"}
    theirs = save_folder(tmp_path / "theirs", cfg, dense_weights())
    (theirs / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    status, said = run(theirs, tmp_path / "ours")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert "its input scale is" in said or "the factor is lost" in said


def test_what_it_computes_is_finite(gpt2):
    found = trained(SIZES | FLAT, dense_weights())
    overflowing = replace(found, W_dec=torch.full_like(found.W_dec, 3e38))
    with pytest.raises(ValueError, match="not finite"):
        overflowing.for_raw_z(4, torch.full((D_IN,), 1e-9))
