"""Folders of many architectures: loaded as Hugging Face computes them, or refused in a sentence."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.helpers import save_tokenizer
from trainer.evaluate import repeated_tokens
from trainer.model.lm import LanguageModel

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SIZE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 96, "initializer_range": 0.3}  # fmt: skip
GATED = SIZE | {"intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
GEMMA = GATED | {"head_dim": 12, "pad_token_id": None}
LOADS = {
    "gpt2": hf.GPT2Config(**GPT),
    "gpt2, n_inner": hf.GPT2Config(**GPT, n_inner=40),
    "gpt-neo": hf.GPTNeoConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=96, window_size=8,
        attention_types=[[["global", "local"], 1]], initializer_range=0.3,
    ),
    "gpt-j": hf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt-j, n_inner": hf.GPTJConfig(**GPT, rotary_dim=4, n_inner=40),
    "gpt-neox": hf.GPTNeoXConfig(**SIZE, intermediate_size=48, rotary_emb_base=500, rotary_pct=0.5),
    "opt": hf.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "llama": hf.LlamaConfig(**GATED),
    "llama, head_dim": hf.LlamaConfig(**GATED, head_dim=24),
    "llama 3.1": hf.LlamaConfig(**GATED, rope_theta=5e5, rope_scaling=LLAMA3),
    "llama, tied": hf.LlamaConfig(**GATED, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**GATED, sliding_window=10),
    "mistral, head_dim": hf.MistralConfig(**GATED, head_dim=12, sliding_window=None),
    "mixtral": hf.MixtralConfig(**GATED, num_local_experts=2, sliding_window=None),
    "qwen2": hf.Qwen2Config(**GATED),
    "qwen3": hf.Qwen3Config(**GATED, head_dim=12),
    "phi": hf.PhiConfig(**GATED | {"num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "phi3": hf.Phi3Config(**GATED, pad_token_id=None),
    "gemma": hf.GemmaConfig(**GEMMA),
    "gemma 2": hf.Gemma2Config(**GEMMA, sliding_window=10, query_pre_attn_scalar=20),
    "gemma 3": hf.Gemma3TextConfig(**GEMMA, sliding_window=10, query_pre_attn_scalar=20),
}  # fmt: skip
REFUSED = {
    "llama, linear scaling": hf.LlamaConfig(**GATED, rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama, attention biases": hf.LlamaConfig(**GATED, attention_bias=True),
    "qwen2, window": hf.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=0),
    "falcon": hf.FalconConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mamba": hf.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2),
}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Writes a model of random weights, biases too, in a folder; the cache of verdicts is empty."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))

    def save(config):
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        return tmp_path / "model", model

    return save


@pytest.mark.parametrize("kind", LOADS)
def test_what_hugging_face_computes(kind, saved):
    folder, model = saved(LOADS[kind])
    tokens = torch.arange(96)[None] % 300
    theirs = model(tokens).logits.log_softmax(-1)
    for dtype, bound in (("float32", 1e-2), ("bfloat16", 0.15)):
        lm = LanguageModel.load(str(folder), dtype=dtype)
        assert lm.n_ctx == 96 and lm.dtype == dtype
        ours = lm.logits(lm.layer(1).final(lm.layer(1).prefix(tokens)[0])).float().log_softmax(-1)
        assert (ours - theirs).abs().mean() < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", REFUSED)
def test_another_model_is_refused(kind, dtype, saved):
    folder, _ = saved(REFUSED[kind])
    with pytest.raises(ValueError, match=r"refused|cannot convert") as refusal:
        LanguageModel.load(str(folder), dtype=dtype)
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 500


def test_a_verdict_is_kept_as_long_as_the_files_are_the_same(saved, monkeypatch):
    folder, model = saved(LOADS["llama"])
    LanguageModel.load(str(folder))
    monkeypatch.setattr("trainer.model.check._head_outputs", lambda *_: float("nan"))
    LanguageModel.load(str(folder))
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="computes other head outputs"):
        LanguageModel.load(str(folder))


def test_the_last_positions_are_looked_at(saved, monkeypatch):
    """A fault that shows beyond what the whole model is compared on."""
    monkeypatch.setattr("trainer.model.check._DEEP", 16)
    folder, _ = saved(hf.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=40, max_window_layers=0))
    with pytest.raises(ValueError, match="computes other head outputs"):
        LanguageModel.load(str(folder))


def test_more_positions_are_made_when_they_are_needed(saved, monkeypatch):
    """Masks and rotary tables of Gemma 3: two kinds of layers, one table each, shared."""
    monkeypatch.setattr("trainer.model.loading._AT_ONCE", 8)
    folder, model = saved(LOADS["gemma 3"])
    lm = LanguageModel.load(str(folder))
    tokens = torch.arange(96)[None] % 300
    ours = lm.logits(lm.layer(0).final(lm.layer(0).prefix(tokens)[0])).log_softmax(-1)
    assert (ours - model(tokens).logits.log_softmax(-1)).abs().max() < 1e-2
    blocks = lm.model.blocks
    assert len({block.attn.mask.data_ptr() for block in blocks}) == len({block.attn.attn_type for block in blocks})
    assert blocks[0].attn.mask.shape == (96, 96)
    half = LanguageModel.load(str(folder), dtype="bfloat16").model.blocks  # cast after it was checked
    assert len({each.attn.rotary_sin.data_ptr() for each in half}) == len({each.attn.attn_type for each in half})


def test_ids_without_a_token(saved):
    """Pythia, Qwen and Phi have more rows in the unembedding than their tokenizers have tokens."""
    folder, _ = saved(LOADS["llama"])  # 300 rows, 257 tokens
    lm = LanguageModel.load(str(folder))
    assert lm.token_strings([299, 257, 66]) == ["<299>", "<257>", lm.tokenizer.decode([66])]
    assert repeated_tokens(lm, 8, 400, 0).max() < 257


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "weights cut off": (lambda f: _cut(f / "model.safetensors"), "could not be loaded"),
    "weights are zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(1000)), "could not be loaded"),
    "a weight is missing": (lambda f: _without(f / "model.safetensors"), "lacks 1 of its weights"),
    "no tokenizer": (lambda f: [each.unlink() for each in f.glob("*token*")], "tokenizer"),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("[1,"), "could not be loaded"),
    "no BOS and no EOS": (lambda f: _edit(f, bos_token=None, eos_token=None), "neither a BOS nor an EOS"),
    "BOS has no row": (lambda f: _added(f), "none of the model's 300 tokens"),
    "code of its own": (lambda f: _own_code(f), "could not be loaded"),
}


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def _without(file):
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def _edit(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    special = folder / "special_tokens_map.json"
    special.write_text(json.dumps({k: v for k, v in (json.loads(special.read_text()) | changes).items() if v}))


def _added(folder):
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<new {i}>" for i in range(60)])
    tokenizer.bos_token = "<new 59>"
    tokenizer.save_pretrained(folder)


def _own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_a_sentence(fault, saved):
    folder, _ = saved(LOADS["llama"])
    damage, says = FAULTS[fault]
    damage(folder)
    with pytest.raises(ValueError, match=says) as refusal:
        LanguageModel.load(str(folder))
    assert len(str(refusal.value).splitlines()) == 1 and len(str(refusal.value)) < 500


def test_bos_stands_in_for_eos_and_the_other_way_round(saved):
    folder, _ = saved(LOADS["llama"])
    for gone in ("bos_token", "eos_token"):
        _edit(folder, **{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"} | {gone: None})
        tokenizer = LanguageModel.load(str(folder)).tokenizer
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
