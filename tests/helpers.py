"""Small models, texts and SAEs that the tests make themselves; nothing is downloaded."""

import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, settings
from streamlit.testing.v1 import AppTest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

ROOT = Path(__file__).parents[1]
PAGES = [
    f"pages/{name}.py"
    for name in ("model", "tradeoffs", "heads", "prompt", "compare", "features", "runs", "start", "circuit")
]
PATIENCE = 600  # seconds that anything may take: a test fails where something hangs, not where the machine is busy
OTHERS = {"bricken": "--l1_coefficients=0.3", "gated": "--l1_coefficients=2", "jumprelu": "--l1_coefficients=2",
          "topk": "--k=9", "batchtopk": "--k=9"}  # fmt: skip
ANALYSED = ["block-l1_1", "dense", "batchtopk"]  # of the checkpoints that tests train
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
        if path := shutil.which(name):
            return path
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


def save_tiny_neox(folder: Path) -> None:
    """A randomly initialised GPT-NeoX (Pythia): attention and MLP side by side, half of each head rotated."""
    torch.manual_seed(2)
    config = GPTNeoXConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        rotary_pct=0.5,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    for block in model.gpt_neox.layers:
        block.attention.query_key_value.bias.data.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)


def save_tiny_gemma2(folder: Path) -> None:
    """A randomly initialised Gemma 2: norms after the attention, and soft caps that are felt."""
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=16,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:  # Hugging Face starts with a weight of 1, which would hide it
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)


class ToyTokenizer:
    """Texts of token ids, for models that are put together by hand; id 0 is BOS."""

    bos_token_id = 0
    all_special_ids = (0,)

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, ids: list[list[int]], **options) -> list[str]:
        return [self.texts[i] for [i] in ids]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.texts[i] for i in ids]


def planted(vocabulary: int = 60, n_ctx: int = 41) -> Any:
    """Three attention-only layers with one head of each kind; the other head of each layer attends everywhere alike.

    The residual stream has one-hot parts: token, position, previous token (written by the previous-token head).
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    from trainer.model.lm import LanguageModel

    token, position, previous = 0, vocabulary, vocabulary + n_ctx
    d_head, gain = max(vocabulary, n_ctx) + 1, 40.0
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=2 * vocabulary + n_ctx, n_ctx=n_ctx, d_head=d_head, n_heads=2, d_vocab=vocabulary,
        attn_only=True, normalization_type=None, init_weights=False,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.W_E.data[:, token : token + vocabulary] = torch.eye(vocabulary)
    model.W_pos.data[:, position : position + n_ctx] = torch.eye(n_ctx)
    before, copies, induction = (model.blocks[layer].attn for layer in range(3))
    for p in range(n_ctx):
        before.W_Q.data[1, position + p, p] = gain
        if p:
            before.W_K.data[1, position + p - 1, p] = gain
        copies.W_K.data[0, position + p, d_head - 1] = -2.0 * p  # of two copies the earlier one, not the token itself
    for t in range(vocabulary):
        before.W_V.data[1, token + t, t] = 1
        before.W_O.data[1, t, previous + t] = 1
        copies.W_Q.data[0, token + t, [t, d_head - 1]] = gain
        copies.W_K.data[0, token + t, t] = 10 * gain
        induction.W_Q.data[1, token + t, t] = gain
        induction.W_K.data[1, previous + t, t] = gain
    for t in range(vocabulary):  # the induction head predicts what it reads
        induction.W_V.data[1, token + t, t] = 1
        induction.W_O.data[1, t, token + t] = 1
        model.unembed.W_U.data[token + t, t] = 1
    lm = LanguageModel(model, "planted")
    lm.tokenizer = ToyTokenizer(["<s>"] + ["ab"] * (vocabulary - 1))
    return lm


def tiny_run(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a run of seconds on one of the models above; `more` override these."""
    return [
        f"--model={model}", f"--dataset={text}", f"--out={out}", "--hook_layer=1", "--expansion_factor=4",
        "--buffer_tokens=1024", "--context_size=32", "--eval_tokens=200", "--log_every=4", "--wandb=disabled",
        "--device=cpu", *more,
    ]  # fmt: skip


def unfolded_z(folder: Path, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """z of a layer of the tiny GPT-2 `[1, pos, head, d_head]` as Hugging Face computes it: with value biases."""
    kept: list[torch.Tensor] = []
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
    return kept[0].unflatten(-1, (model.config.n_head, -1))


def write_text(path: Path, documents: int = 60, words: int = 300) -> Path:
    """Documents of words drawn from a small vocabulary, one JSON record a line."""
    generator = torch.Generator().manual_seed(2)
    vocabulary = ["the", "head", "reads", "a", "token", "from", "layer", "and", "writes", "it", "back", "again"]
    with path.open("w") as file:
        for _ in range(documents):
            picks = torch.randint(len(vocabulary), (words,), generator=generator)
            file.write(json.dumps({"text": " ".join(vocabulary[i] for i in picks)}) + "\n")
    return path


def write_data_set(folder: Path, files: list[list[dict]]) -> Path:
    """A data set that is streamed, of files with these records."""
    folder.mkdir()
    for number, records in enumerate(files):
        (folder / f"{number:02}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: all\n  data_files: '*.jsonl'\n---\n")
    return folder


def open_page(page: str, **query) -> AppTest:
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=PATIENCE)
    app.switch_page(page)  # before the first run: the default page would keep what it chose in the session
    for key, value in query.items():
        app.query_params[key] = value
    return app.run()


def listed(app: AppTest, key: str) -> pd.DataFrame:
    """The rows of a listing, by the names of their fields; `app.dataframe` has the tables."""
    (proto,) = [of.proto for of in app.get("bidi_component") if of.proto.id.endswith(f"-{key}")]
    data = json.loads(proto.json)
    return pd.DataFrame(data["rows"], columns=[column["name"] for column in data["columns"]])


def said(app: AppTest) -> str:
    kinds = (app.info, app.error, app.warning, app.caption, app.markdown, app.text)
    return "\n".join(element.value for kind in kinds for element in kind)


def decided(**given):
    """The one SAE that some options ask for."""
    from trainer.config import SAEOptions

    coefficient = given.pop("l1_coefficient", None)
    (sae,) = SAEOptions(**given | ({} if coefficient is None else {"l1_coefficients": coefficient})).decide()
    return sae


def config_of(sae, lm=None, layer: int = 0, text: str = "toy", context_size: int = 16, **more):
    """What config.json says of an SAE that was put together by hand."""
    from trainer.checkpoint import Config, Imported, Model, Sizes, Text

    name, fingerprint = (lm.name, lm.fingerprint()) if lm else ("toy", "0")
    n_heads, d_head = (lm.n_heads, lm.d_head) if lm else (sae.n_blocks, sae.width)
    processing = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), True)
    hook = f"blocks.{layer}.attn.hook_z"
    model = Model(name, fingerprint, n_heads, d_head, "float32", processing, hook, layer)
    imported = Imported("tests", "april", l1_coefficient=2.0, k=7)
    return Config(Sizes.of(sae), model, Text(text, "0", context_size, 0.1, "text"), "toy", imported=imported, **more)


def edit_config(path: Path, **changes) -> None:
    """Change keys of config.json as they are on disk."""
    edit_json(path / "config.json", **changes)


def edit_json(file: Path, **changes) -> None:
    """Change keys of a file as they are on disk."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def spoil(folder: Path, good: Path) -> list[str]:
    """Put copies of a checkpoint into `folder`, each bad in another way; returns their names as they can be printed."""

    def write(data: bytes, *files: str):
        def spoiled(path: Path) -> None:
            for file in files or ("config.json",):
                (path / file).write_bytes(data)

        return spoiled

    def instead(make, file: str = "config.json"):
        def spoiled(path: Path) -> None:
            (path / file).unlink()
            make(path / file)

        return spoiled

    def values(**sae):
        config = json.loads((good / "config.json").read_text())
        return lambda path: edit_config(path, sae=config["sae"] | sae)

    ways = {
        "nested": write(b'{"a":' * 2000 + b"1" + b"}" * 2000),
        "nested-eval": write(b"[" * 100_000, "eval.json"),
        "long-integer": write(b'{"schema_version": ' + b"9" * 5000 + b"}"),
        "no-utf-8": write(b'{"schema_version": 3, "group": "\xff"}'),
        "empty": write(b""),
        "empty-eval": write(b"", "eval.json"),
        "zeros": write(b"\0" * 4096),
        "null": write(b"null"),
        "null-eval": write(b"null", "eval.json"),
        "not-a-number": write(b'{"L0": NaN}', "eval.json"),
        "missing-keys": write(b'{"schema_version": 3}'),
        "missing-figures": write(b'{"n_tokens": 3, "L0": 1.0}', "eval.json"),
        "pipe": instead(os.mkfifo),
        "pipe-eval": instead(os.mkfifo, "eval.json"),
        "pipe-weights": instead(os.mkfifo, "sae.safetensors"),
        "directory": instead(Path.mkdir),
        "directory-weights": instead(Path.mkdir, "sae.safetensors"),
        "loop": instead(lambda file: file.symlink_to(file.name)),
        "endless": instead(lambda file: file.symlink_to("/dev/zero"), "eval.json"),
        "huge-sizes": values(n_blocks=10**9, features_per_block=10**12),
        "negative-sizes": values(features_per_block=-1),
        "zero-sizes": values(width=0),
        "strings": values(features_per_block="9"),
        "activation": values(activation="tanh"),
        "empty-weights": write(b"", "sae.safetensors"),
        "zero-weights": write(b"\0" * 4096, "sae.safetensors"),
    }
    for name, way in ways.items():
        way(shutil.copytree(good, folder / name))
    shutil.copytree(good, folder / os.fsdecode(b"name-\xff"))
    return [*ways, "name-\\udcff"]
