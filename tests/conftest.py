"""Small models, texts and SAEs that the tests make themselves; nothing is downloaded."""

import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds that anything may take: a test fails where something hangs, not where the machine is busy
OTHERS = {"bricken": "--l1_coefficients=0.3", "gated": "--l1_coefficients=2", "jumprelu": "--l1_coefficients=2",
          "topk": "--k=9", "batchtopk": "--k=9"}  # fmt: skip
for _name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):
    os.environ.setdefault(_name, str(PATIENCE))
settings.register_profile(
    "patient", parent=settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")
torch.set_num_threads(1)  # the models are tiny and pytest runs two workers: more threads only wait for each other


def find_chromium() -> str:
    """The browser on the PATH; without one the test that asks is skipped, but fails in CI."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail("CI must have a browser: install Debian's chromium", pytrace=False)
    pytest.skip("no Chromium on this machine")


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: 256 bytes and <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end, pad_token=end
    ).save_pretrained(folder)


def save_tiny_gpt2(folder: Path) -> None:
    """A randomly initialised GPT-2 with 6 layers of 4 heads, large weights so that heads differ."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=32, n_layer=6, n_head=4, initializer_range=0.2)
    config.n_ctx = 256  # as the real gpt2's config has it, and TransformerLens reads it
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:  # Hugging Face starts with zero biases, which would hide b_V
        block.attn.c_attn.bias.data.normal_(std=0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tiny_llama(folder: Path) -> None:
    """A randomly initialised Llama with grouped-query attention: 6 query heads, 2 key-value heads."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rope_theta=50_000.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def write_text(path: Path, documents: int = 60, words: int = 300) -> Path:
    """Documents of words drawn from a small vocabulary, one JSON record a line."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = ["the", "head", "reads", "a", "token", "from", "layer", "and", "writes", "it", "back", "again"]
    with path.open("w") as file:
        for _ in range(documents):
            picks = torch.randint(len(vocabulary), (words,), generator=generator)
            file.write(json.dumps({"text": " ".join(vocabulary[i] for i in picks)}) + "\n")
    return path


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tiny_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")  # the word in the path is what TransformerLens trips over
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def gpt2(gpt2_folder):
    from trainer.lm import LanguageModel

    return LanguageModel.load(str(gpt2_folder))


@pytest.fixture(scope="session")
def llama(llama_folder):
    from trainer.lm import LanguageModel

    return LanguageModel.load(str(llama_folder))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, gpt2_folder, text_file):
    """Two block-diagonal checkpoints, a dense one, and one of each other activation on the tiny GPT-2."""
    from trainer.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    arguments = [
        f"--model={gpt2_folder}", f"--dataset={text_file}", f"--out={folder}", "--hook_layer=1", "--expansion_factor=4",
        "--total_training_steps=20", "--batch_size=128", "--buffer_tokens=1024", "--context_size=32", "--lr=1e-3",
        "--eval_tokens=200", "--log_every=5", "--wandb=disabled", "--device=cpu",
    ]  # fmt: skip
    os.environ["ATTN_SAES_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        for l1 in (1, 4):
            assert main([*arguments, f"--l1_coefficients={l1}", f"--name=block-l1_{l1}"]) == 0
        assert main([*arguments, "--block=dense", "--l1_coefficients=2", "--name=dense"]) == 0
        for recipe, sparsity in OTHERS.items():
            assert main([*arguments, f"--recipe={recipe}", sparsity, f"--name={recipe}"]) == 0
    finally:
        del os.environ["ATTN_SAES_CACHE"]
    return folder


@pytest.fixture
def show_copy(tmp_path, monkeypatch):
    """Copies a folder of checkpoints, so that a test may change it, and points the app at the copy."""

    def show(checkpoints: Path) -> Path:
        copy = tmp_path / "checkpoints"
        shutil.copytree(checkpoints, copy)
        monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(copy))
        return copy

    return show


@pytest.fixture
def folder(trained, show_copy):
    return show_copy(trained)
