"""To and from SAELens: the same numbers as sae_lens itself, on random z and on z of a model."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from analysis.__main__ import main as analyse
from analysis.runs import tables
from tests.helpers import PAGES, config_of, open_page, unfolded_z
from trainer import checkpoint
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.imports.saelens import from_saelens
from trainer.model.loading import PROCESSING
from trainer.saelens import main, to_saelens

HOOK = "blocks.1.attn.hook_z"
N_HEADS, D_HEAD = 4, 8  # of the tiny GPT-2
SECTIONS = {
    "pages/heads.py": ["Overview", "Figures", "Monosemanticity", "Redundancy across heads"],
    "pages/compare.py": ["Figures", "One prompt", "Features"],
}
FOLDED = {"model_from_pretrained_kwargs": {"fold_ln": True, "fold_value_biases": True}}
KINDS = {  # what BlockDiagSAE is made of
    "april": (4, 8, 12, "relu", None, "head"),
    "jumprelu": (4, 8, 12, "jumprelu", None, "layer"),
    "topk": (4, 8, 12, "topk", 5, "layer"),
    "dense-april": (1, 32, 20, "relu", None, "layer"),
    "dense-jumprelu": (1, 32, 20, "jumprelu", None, "layer"),
    "dense-topk": (1, 32, 20, "topk", 3, "head"),
}


def random_sae(kind: str) -> BlockDiagSAE:
    torch.manual_seed(3)
    sae = BlockDiagSAE(*KINDS[kind]).requires_grad_(False)
    for name, parameter in sae.named_parameters():
        parameter.copy_(parameter + 0.3 * torch.randn_like(parameter))
        if name == "threshold":
            parameter.abs_().add_(0.1)
    return sae


@pytest.fixture
def save(gpt2, text_file):
    """Writes an SAE as a checkpoint on layer 1 of the tiny GPT-2."""

    def write(path, sae: BlockDiagSAE) -> Checkpoint:
        checkpoint.save(path, sae, config_of(sae, gpt2, 1, str(text_file)))
        return Checkpoint(path)

    return write


@pytest.fixture(scope="module")
def inputs(gpt2):
    """z: random, and of the model, [batch, pos, head, d_head]."""
    torch.manual_seed(4)
    tokens = torch.randint(1, 257, (3, 16))
    return torch.cat([torch.randn(3, 16, N_HEADS, D_HEAD), gpt2.layer(1).z(tokens)])


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest value, and not by both being zero."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_same(ours: BlockDiagSAE, theirs, z: torch.Tensor) -> None:
    """Same features active, same reconstructions; activations count in lengths of decoder rows but in topk."""
    f, expected = ours.encode(z).flatten(-2), theirs.encode(z)
    if ours.activation != "topk":
        expected = expected * theirs.W_dec.norm(dim=-1)
        assert_close(ours.W_dec.norm(dim=-1), torch.ones_like(ours.b_enc))
    assert torch.equal(f > 0, expected > 0)
    assert 0.02 < (f > 0).float().mean() < 0.98
    assert_close(f, expected)
    assert_close(ours(z), theirs(z))


def their_sae(architecture: str = "standard", metadata=(), d_in: int = N_HEADS * D_HEAD, **options):
    """A sae-lens SAE with random dense weights, as SAELens makes it."""
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    kind, kind_config = (get_sae_training_class if architecture == "batchtopk" else get_sae_class)(architecture)
    options = {"reshape_activations": "hook_z", **options, "metadata": SAEMetadata(hook_name=HOOK, **dict(metadata))}
    sae = kind(kind_config(d_in=d_in, d_sae=20, **options)).requires_grad_(False)
    torch.manual_seed(5)
    for name, parameter in sae.named_parameters():
        parameter.copy_(0.4 * torch.randn_like(parameter))
        if name == "threshold":
            parameter.abs_()
    return sae


def for_raw_z(theirs) -> BlockDiagSAE:
    return from_saelens(theirs).for_raw_z(N_HEADS, torch.ones(N_HEADS * D_HEAD))


@pytest.fixture
def run(capsys):
    """The command line; returns the exit status and what it said on stderr."""

    def call(*arguments) -> tuple[int, str]:
        status = main([str(argument) for argument in arguments])
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_the_same(kind, save, inputs, tmp_path):
    sae = random_sae(kind)
    theirs = to_saelens(save(tmp_path, sae))
    f = sae.encode(inputs).flatten(-2)
    assert 0.05 < (f > 0).float().mean() < 0.95
    assert_close(theirs.encode(inputs), f)
    assert_close(theirs(inputs), sae(inputs))
    assert theirs.W_enc.shape == (sae.d_in, sae.d_sae)


@pytest.mark.parametrize("kind", ["april", "jumprelu", "topk", "dense-jumprelu"])
def test_sae_lens_opens_an_exported_folder(kind, save, inputs, tmp_path, run):
    import sae_lens

    sae = random_sae(kind)
    config = save(tmp_path / "ours", sae).config
    assert run("export", tmp_path / "ours", tmp_path / "new" / "theirs") == (0, "")
    with pytest.warns(UserWarning, match="fold_value_biases|model_from_pretrained_kwargs"):
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "new" / "theirs")
    assert_close(theirs.encode(inputs), sae.encode(inputs).flatten(-2))
    assert_close(theirs(inputs), sae(inputs))
    assert theirs.cfg.reshape_activations == "hook_z"
    metadata = theirs.cfg.metadata
    assert metadata.model_name == config.model.name
    assert (metadata.hook_name, metadata.hook_head_index, metadata.prepend_bos) == (HOOK, None, True)
    assert (metadata.context_size, metadata.dataset_path) == (16, config.text.name)
    assert (metadata.n_heads, metadata.d_head, metadata.recipe) == (N_HEADS, D_HEAD, "april")
    assert metadata.model_from_pretrained_kwargs == PROCESSING
    assert metadata.sae_lens_training_version is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["theirs"]


@pytest.mark.parametrize("kind", ["april", "jumprelu", "topk", "dense-topk"])
def test_export_and_import_is_a_round_trip(kind, save, inputs, tmp_path, run):
    sae = random_sae(kind)
    sae.fold_scale(torch.ones_like(sae.b_dec))  # as every finished checkpoint is
    config = save(tmp_path / "ours", sae).config
    assert run("export", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    status, said = run("import", tmp_path / "theirs", tmp_path / "back", "--eval_tokens=60")
    assert status == 0, said
    imported = Checkpoint(tmp_path / "back")
    back, described = imported.sae, imported.config
    assert (back.n_blocks, back.width, back.features_per_block) == KINDS[kind][:3]
    assert_close(back.encode(inputs), sae.encode(inputs))
    assert_close(back(inputs), sae(inputs))
    assert described.model == config.model
    assert replace(described.text, fingerprint="0") == config.text
    assert imported.is_dense == ("dense" in kind)
    assert (described.imported.l1_coefficient, described.imported.k) == (2.0, 7)
    assert described.imported.recipe == "april"
    figures = imported.eval
    assert figures["n_tokens"] == 60
    f = sae.encode(inputs).flatten(-2)
    assert abs(figures["L0"] - (f[3:, 1:] > 0).sum(-1).float().mean()) < 0.3 * figures["L0"]
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "theirs", "back"}


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("jumprelu", {}),
        ("gated", {}),
        ("topk", {"k": 4}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_a_dense_sae_of_saelens_computes_the_same_here(architecture, options, centred, inputs):
    theirs = their_sae(architecture, apply_b_dec_to_input=centred, **options)
    ours = for_raw_z(theirs)
    assert (ours.n_blocks, ours.width, ours.features_per_block) == (1, N_HEADS * D_HEAD, 20)
    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("rescale", [True, False])
def test_batchtopk_in_training_is_what_saelens_makes_of_it(rescale, inputs, tmp_path):
    import sae_lens

    theirs = their_sae("batchtopk", k=4, rescale_acts_by_decoder_norm=rescale)
    theirs.topk_threshold += 0.7
    ours = for_raw_z(theirs)
    theirs.save_inference_model(tmp_path)
    assert ours.activation == "jumprelu"
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path), inputs)


@pytest.mark.parametrize("architecture", ["standard", "topk", "batchtopk"])
def test_the_scale_of_an_sae_in_training_is_folded(architecture, inputs, tmp_path, gpt2_folder, text_file, run):
    import sae_lens

    theirs = their_sae(
        architecture,
        {"model_name": str(gpt2_folder), "dataset_path": str(text_file), "context_size": 16, **FOLDED},
        normalize_activations="expected_average_only_in",
        **({} if architecture == "standard" else {"k": 4, "rescale_acts_by_decoder_norm": True}),
    )
    if architecture == "batchtopk":
        theirs.topk_threshold += 0.7
    theirs.save_model(tmp_path / "theirs")
    status, said = run("import", tmp_path / "theirs", tmp_path / "ours", "--eval_tokens=60")
    assert (status, said.count("\n")) == (2, 1)
    assert "the factor is lost: say --normalize=global" in said
    (tmp_path / "theirs" / "activation_scaler.json").write_text('{"scaling_factor": 1.7}')
    status, said = run("import", tmp_path / "theirs", tmp_path / "ours", "--eval_tokens=60")
    assert status == 0, said
    # What SAELens folds when training ends, on z that its scaler no longer touches.
    if architecture == "topk":
        theirs.fold_W_dec_norm()  # it selects by |d_i| pre, and would forget that the fold changes |d_i|
        theirs.cfg.rescale_acts_by_decoder_norm = False
    theirs.fold_activation_norm_scaling_factor(1.7)
    if architecture == "batchtopk":
        theirs.save_inference_model(tmp_path / "finished")
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "finished")
    imported = Checkpoint(tmp_path / "ours")
    ours = imported.sae
    assert imported.config.imported.k == (4 if architecture == "topk" else None)
    assert_same(ours, theirs, inputs)


def test_an_imported_dense_sae_is_a_checkpoint_like_any_other(
    inputs, tmp_path, gpt2_folder, text_file, run, trained, monkeypatch
):
    theirs = their_sae(
        "gated",
        {
            "model_name": "gpt2-small",
            "dataset_path": "elsewhere",
            "context_size": 4096,
            "hook_head_index": None,
            **FOLDED,
        },
        apply_b_dec_to_input=True,
    )
    theirs.save_model(tmp_path / "theirs")
    out = tmp_path / "checkpoints" / "gated"
    text = tmp_path / "body.jsonl"
    text.write_text(text_file.read_text().replace('{"text"', '{"body"'))
    arguments = [f"--model={gpt2_folder}", f"--dataset={text}", "--text_column=body", "--eval_tokens=200"]
    status, said = run("import", tmp_path / "theirs", out, *arguments)
    assert status == 0, said
    (listed,), errors = checkpoint.list_checkpoints(out.parent)
    assert not errors
    assert_same(listed.sae, theirs, inputs)
    assert listed.is_dense and listed.is_complete and listed.config.imported.source == "SAELens gated"
    assert (listed.config.model.name, listed.layer) == (str(gpt2_folder), 1)
    assert (listed.config.text.name, listed.config.text.context_size) == (str(text), 256)
    row = tables.summary([listed]).iloc[0]
    assert (row["figures"], row["recipe"]) == ("held-out", "SAELens gated (dense)")
    assert row["d_sae"] == 20
    assert analyse([str(out), "--tokens=400", "--device=cpu"]) == 0
    shutil.copytree(trained / "block-l1_1", out.parent / "ours")
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(out.parent))
    for page in PAGES:
        for show in SECTIONS.get(page, ["Figures"]):
            app = open_page(page, checkpoint="gated", sae="gated", run="gated", a="gated", b="ours", show=show)
            assert not app.exception and not app.error, (page, show)
            asks_for_none = [*PAGES[:2], "pages/circuit.py"]  # all checkpoints at once, or a set of several layers
            assert page in asks_for_none or "gated" in [box.value for box in app.selectbox]


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk"])
def test_value_biases_in_their_z_move_into_our_biases(architecture, tmp_path, gpt2_folder, gpt2, text_file, run):
    """SAELens trains on models loaded without processing. Their z is taken from Hugging Face's own GPT-2."""
    loading = {"center_writing_weights": False}  # what SAELens' training writes
    metadata = {"model_name": str(gpt2_folder), "dataset_path": str(text_file), "context_size": 16,
                "model_from_pretrained_kwargs": loading}  # fmt: skip
    options = {"k": 4, "rescale_acts_by_decoder_norm": True} if architecture == "topk" else {}
    theirs = their_sae(architecture, metadata, **options)
    theirs.save_model(tmp_path / "in")
    status, said = run("import", tmp_path / "in", tmp_path / "out", "--eval_tokens=60")
    assert status == 0, said
    ours = Checkpoint(tmp_path / "out").sae

    tokens = gpt2.to_tokens("the head reads a token and writes it back again")
    their_z = unfolded_z(gpt2_folder, 1, tokens)
    z, b_V = gpt2.layer(1).z(tokens), gpt2.layer(1).folded_b_V
    assert b_V.abs().min() > 0
    assert_close(z + b_V, their_z)
    f, expected = ours.encode(z).flatten(-2), theirs.encode(their_z)
    assert torch.equal(f > 0, expected > 0)
    assert_close(ours(z) + b_V, theirs(their_z))


def _wrong(folder, key, value) -> None:
    """Change one entry of cfg.json or its metadata."""
    file = folder / "cfg.json"
    config = json.loads(file.read_text())
    (config if key in config and key != "metadata" else config["metadata"])[key] = value
    file.write_text(json.dumps(config))


def _other_layer(folder) -> None:
    _wrong(folder, "hook_name", "blocks.9.attn.hook_z")
    _wrong(folder, "model_from_pretrained_kwargs", {"center_writing_weights": False})


REFUSED = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no folder or file here"),
    "damaged config": (lambda folder: (folder / "cfg.json").write_text("{"), "cannot be imported"),
    "no config": (lambda folder: (folder / "cfg.json").write_text("[]"), "cannot be imported"),
    "damaged weights": (
        lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"x" * 9),
        "cannot be imported",
    ),
    "no weights": (lambda folder: (folder / "sae_weights.safetensors").unlink(), "sae_weights.safetensors"),
    "other sizes": (lambda folder: _wrong(folder, "d_sae", 21), "cannot be imported"),
    "other architecture": (lambda folder: _wrong(folder, "architecture", "transcoder"), "architecture is transcoder"),
    "unfoldable": (lambda folder: _wrong(folder, "normalize_activations", "layer_norm"), "normalised (layer_norm)"),
    "rotated z": (
        lambda folder: _wrong(folder, "model_from_pretrained_kwargs", {"refactor_factored_attn_matrices": True}),
        "other dimensions",
    ),
    "half folded": (
        lambda folder: _wrong(folder, "model_from_pretrained_kwargs", {"fold_value_biases": True}),
        "layer norms not",
    ),
    "unknown value biases": (
        lambda folder: _wrong(folder, "sae_lens_training_version", None),
        "--fold_value_biases=true",
    ),
    "other checkpoint of the model": (
        lambda folder: _wrong(folder, "model_from_pretrained_kwargs", {"checkpoint_index": 3}),
        "--model",
    ),
    "wrong hook": (lambda folder: _wrong(folder, "hook_name", "blocks.1.hook_mlp_out"), "reads blocks.1.hook_mlp_out"),
    "one head": (lambda folder: _wrong(folder, "hook_head_index", 2), "reads head 2 only"),
    "no such layer": (_other_layer, "layers 0 to 5"),
    "no model": (lambda folder: _wrong(folder, "model_name", None), "--model"),
    "unknown model": (lambda folder: _wrong(folder, "model_name", "gpt-none"), "unknown model 'gpt-none'"),
    "no text": (lambda folder: _wrong(folder, "dataset_path", None), "--dataset"),
    "missing text": (lambda folder: _wrong(folder, "dataset_path", "none.txt"), "text file none.txt does not exist"),
    "too little text": (lambda folder: None, "ask for fewer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_import_is_one_sentence_and_leaves_nothing(case, tmp_path, gpt2_folder, text_file, run):
    # SAELens itself refuses to reshape what is no hook_z.
    options = {"reshape_activations": "none"} if case == "wrong hook" else {}
    metadata = {"model_name": str(gpt2_folder), "dataset_path": str(text_file), "context_size": 16}
    their_sae("standard", {**metadata, "hook_head_index": None}, **options).save_model(tmp_path / "theirs")
    change, sentence = REFUSED[case]
    change(tmp_path / "theirs")
    out = tmp_path / "checkpoints" / "new"
    status, said = run("import", tmp_path / "theirs", out, f"--eval_tokens={10**9 if 'little' in case else 60}")
    assert (status, said.strip().count("\n")) == (2, 0), said
    assert said.startswith("error: ") and sentence in said
    assert list(out.parent.iterdir()) == []


def test_an_sae_that_does_not_fit_the_model_is_refused(tmp_path, gpt2_folder, text_file, run):
    metadata = {"model_name": str(gpt2_folder), "dataset_path": str(text_file)}
    their_sae("standard", metadata, d_in=48).save_model(tmp_path / "theirs")
    status, said = run("import", tmp_path / "theirs", tmp_path / "new")
    assert status == 2
    assert "reads 48 dimensions" in said and "4 heads of 8 = 32" in said
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_finite_are_refused():
    theirs = their_sae()
    theirs.W_dec[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        for_raw_z(theirs)


def test_topk_of_each_head_cannot_be_exported(save, tmp_path, run):
    save(tmp_path / "ours", BlockDiagSAE(4, 8, 12, "topk", 2, "head"))
    status, said = run("export", tmp_path / "ours", tmp_path / "theirs")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert "k features of each head" in said
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_nothing_is_overwritten(save, tmp_path, run):
    save(tmp_path / "ours", random_sae("april"))
    assert run("export", tmp_path / "ours", tmp_path / "theirs") == (0, "")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for arguments in (("export", tmp_path / "ours", tmp_path / "theirs"),
                      ("import", tmp_path / "theirs", tmp_path / "ours")):  # fmt: skip
        status, said = run(*arguments)
        assert status == 2
        assert "exists already" in said
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_checkpoint_that_cannot_be_read_is_one_sentence(tmp_path, run):
    status, said = run("export", tmp_path / "none", tmp_path / "theirs")
    assert (status, said.strip().count("\n")) == (2, 0)
    assert "config.json is missing" in said
