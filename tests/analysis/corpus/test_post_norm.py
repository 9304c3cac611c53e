"""A model that normalises attention outputs again (Gemma 2): trained on, analysed, drawn and shown like any other."""

import os

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.store import Analysis
from tests.helpers import open_page, said, tiny_run
from trainer.__main__ import main as train
from trainer.checkpoint import Checkpoint

LAYER = 1


@pytest.fixture(scope="module")
def analysed(gemma2_folder, text_file, tmp_path_factory):
    """A block-diagonal and a dense checkpoint on the tiny Gemma 2, with their analyses."""
    out = tmp_path_factory.mktemp("postnorm")
    more = ("--total_training_steps=10", "--batch_size=64", "--l1_coefficients=1", "--lr=1e-3")
    os.environ["ATTN_SAES_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        for block in ("head", "dense"):
            assert train(tiny_run(gemma2_folder, text_file, out, *more, f"--block={block}", f"--name={block}")) == 0
    finally:
        del os.environ["ATTN_SAES_CACHE"]
    assert main([str(out / "head"), str(out / "dense"), "--tokens=300", "--examples=3", "--device=cpu"]) == 0
    return out


@pytest.mark.parametrize("name", ["head", "dense"])
def test_the_whole_analysis(name, analysed, gemma2):
    checkpoint = Checkpoint(analysed / name)
    analysis, sae, model = Analysis(checkpoint), checkpoint.sae, gemma2.model
    n_tokens = analysis.meta["n_tokens"]
    contexts = checkpoint.open_text(gemma2.tokenizer).held_out(n_tokens // 31)
    _, cache = model.run_with_cache(contexts)
    z, v, pattern = (cache[f"blocks.{LAYER}.attn.hook_{each}"] for each in ("z", "v", "pattern"))
    v = v.repeat_interleave(2, dim=2)
    f = sae.encode(z)
    f[:, 0] = 0
    features = analysis.features

    assert np.allclose(features["density"], (f > 0).float().sum((0, 1)).flatten() / n_tokens, atol=2e-3)
    assert np.allclose(analysis.heads["attention_bos"], pattern[:, :, 1:, 0].mean((0, 2)), atol=1e-3)

    block = model.blocks[LAYER]
    mean = (1 / (cache["ln_final.hook_scale"] * cache[f"blocks.{LAYER}.ln1_post.hook_scale"]))[:, 1:].mean()
    feature = int(f.sum((0, 1)).argmax())
    row = sae.W_dec[feature // sae.features_per_block, feature % sae.features_per_block]
    if name == "head":
        written = row @ block.attn.W_O[feature // sae.features_per_block]
    else:
        written = row @ block.attn.W_O.flatten(0, 1)
    effects = (written * block.ln1_post.w * mean) @ model.W_U
    assert np.allclose(analysis.feature(feature)["top_logits"], effects.topk(10).values, atol=1e-4)

    for pair in analysis.copying.itertuples():  # through the model's own norm: its scale changes no rank
        read = v[pair.context, pair.source, pair.head]
        logits = block.ln1_post((read @ block.attn.W_O[pair.head])[None, None])[0, 0] @ model.W_U
        rank = int((logits > logits[contexts[pair.context, pair.source]]).sum())
        assert rank == pytest.approx(pair.rank, abs=1), "neighbours may change places by rounding"

    shown = analysis.examples(feature)
    constant = analysis.feature(feature)["constant"]
    assert len(shown) and np.allclose(shown["dfa_sum"] + constant, shown["activation"], atol=1e-3)


def test_the_prompt_page(analysed, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(analysed))
    app = open_page("pages/prompt.py", checkpoint="head")
    assert not app.exception and not app.error, said(app)
