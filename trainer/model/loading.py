"""From a name or a folder to a TransformerLens model whose logits are those of Hugging Face."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as tl_loading
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainer import embedded
from trainer.errors import first_line
from trainer.model import architectures, positions
from trainer.model.check import check_same_model

# What loading does to the weights. An SAE is valid only for the z it was trained on, and `fold_value_biases`
# changes z, so the checkpoint records it.
PROCESSING = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
}
_AT_ONCE = 2048  # positions that a rotary model is made for at first; `positions` makes more when they are needed


def load(name: str, device: str, dtype: str) -> HookedTransformer:
    """`smollm2-135m` (embedded), a local Hugging Face folder, or a TransformerLens model name; value biases unfolded.

    Raises:
        ValueError: the name is none of the three, or the files cannot be loaded.
    """
    if name == embedded.NAME:
        return _load_folder(embedded.ensure(), device, dtype, check=False)  # its bytes are known, and so checked once
    if Path(name).is_dir():
        return _load_folder(Path(name), device, dtype, check=True)
    if Path(name).is_absolute() or name.startswith("."):
        raise ValueError(f"there is no model folder {name}")
    return _load_named(name, device, dtype)


def n_layers(name: str) -> int:
    """Attention layers of a model, by its configuration alone.

    Raises:
        ValueError: there is none, or it does not say.
    """
    try:
        folder = embedded.ensure() if name == embedded.NAME else Path(located(name))
        if folder.is_dir():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).num_hidden_layers
        return tl_loading.get_pretrained_model_config(name).n_layers
    except Exception as error:  # transformers, huggingface_hub and TransformerLens each have their own errors
        raise ValueError(f"model {name!r} does not say how many layers it has: {first_line(error)}") from error


def located(name: str) -> str:
    """A local folder by the path at which it is found from everywhere; another name as it is."""
    folder = os.path.abspath(os.path.expanduser(name))
    return folder if name != embedded.NAME and (os.path.isdir(folder) or name.startswith("~")) else name


def _load_named(name: str, device: str, dtype: str) -> HookedTransformer:
    try:
        official = tl_loading.get_official_model_name(name)
    except ValueError:
        raise ValueError(
            f"unknown model {name!r}: give {embedded.NAME!r}, a local Hugging Face folder, "
            "or a name that TransformerLens knows (gpt2-small, gelu-2l, pythia-70m, ...)"
        ) from None
    unfolded = {**PROCESSING, "fold_value_biases": False}
    try:
        model = HookedTransformer.from_pretrained(name, device=device, dtype=dtype, **unfolded)
    except Exception as error:  # transformers, huggingface_hub and requests each have their own errors
        raise ValueError(f"model {name!r} could not be loaded: {first_line(error)}") from error
    _give_ends(model.tokenizer, model.cfg.d_vocab, f"model {name!r}")
    if model.cfg.positional_embedding_type == "rotary":
        positions.share(model, min(model.cfg.n_ctx, _AT_ONCE))
        with suppress(Exception):  # a name whose configuration is not on the hub keeps the library's limit
            model.cfg.n_ctx = architectures.n_ctx(AutoConfig.from_pretrained(official)) or model.cfg.n_ctx
    return model


def _load_folder(path: Path, device: str, dtype: str, check: bool) -> HookedTransformer:
    """Load a Hugging Face folder, which TransformerLens' own loader takes only under an official name."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no Hugging Face model folder: it has no config.json")
    where = device if dtype == "float32" else "cpu"  # two models in float32 may not fit where one in half does
    # trust_remote_code=False: unset, it asks on the terminal whether to run what a folder brings along.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    part = ""
    try:
        # eager: the others leave out Gemma 2's soft cap of the attention scores
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
        )
        part = ": its tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # the library raises whatever a broken file makes it stumble over
        raise ValueError(f"model folder {path}{part} could not be loaded: {first_line(error)}") from error
    hf_model, info = loaded
    _give_ends(tokenizer, hf_model.config.vocab_size, f"model folder {path}")
    if info["missing_keys"]:  # transformers would draw them at random
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model folder {path} lacks {len(missing)} of its weights, among them {missing[0]}")
    architecture = type(hf_model).__name__
    try:
        cfg = architectures.config(hf_model.config, architecture, where)
        limit = architectures.n_ctx(hf_model.config) or cfg.n_ctx
        if cfg.positional_embedding_type == "rotary":
            cfg.n_ctx = min(limit, _AT_ONCE)
        state = tl_loading.get_pretrained_state_dict(str(path), cfg, hf_model, dtype=torch.float32)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
        model.load_state_dict(_folded(model, state), strict=False)
    except OSError as error:  # no room for what it writes, or a file that is gone by now
        raise ValueError(f"model folder {path} could not be loaded: {first_line(error)}") from error
    except Exception as error:  # as above, of TransformerLens
        raise ValueError(
            f"model folder {path}: TransformerLens cannot convert this {architecture} ({first_line(error)})"
        ) from error
    model.move_model_modules_to_device()
    if cfg.positional_embedding_type == "rotary":
        model.cfg.n_ctx = limit
    if check:
        check_same_model(model, hf_model.to(where), limit, path)
    del hf_model
    model.to(getattr(torch, dtype), print_details=False).to(device, print_details=False)
    positions.share(model, min(limit, _AT_ONCE))  # after the moves, which copy what is shared
    return model


def _folded(model: HookedTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The steps of `PROCESSING`, as load_and_process_state_dict takes them, which loads key by key (10 s)."""
    cfg = model.cfg
    state = model.fill_missing_keys(state)
    layer_norm = cfg.normalization_type == "LNPre"
    if layer_norm or cfg.normalization_type == "RMSPre":
        state = model.fold_layer_norm(state, fold_biases=layer_norm, center_weights=layer_norm)
    if layer_norm:
        state = model.center_writing_weights(state)
    return state if cfg.output_logits_soft_cap > 0 else model.center_unembed(state)  # a soft cap sees the mean


def _give_ends(tokenizer: Any, d_vocab: int, of: str) -> None:
    """See that there are BOS and EOS: where a tokenizer has one of them, that one is both (as GPT-2's)."""
    bos, eos = (getattr(tokenizer, name, None) for name in ("bos_token", "eos_token"))  # a named model may have none
    if bos is None and eos is None:
        raise ValueError(f"{of}: its tokenizer has neither a BOS nor an EOS token: name one in tokenizer_config.json")
    tokenizer.bos_token, tokenizer.eos_token = bos or eos, eos or bos
    for name in ("bos_token", "eos_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is None or index >= d_vocab:
            raise ValueError(f"{of}: {name} {getattr(tokenizer, name)!r} is none of the model's {d_vocab:,} tokens")
