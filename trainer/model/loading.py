"""From a name or a folder to a TransformerLens model whose logits are those of Hugging Face."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as tl_loading
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import embedded

# What loading does to the weights. An SAE is valid only for the z it was trained on, and `fold_value_biases`
# changes z, so the checkpoint records it.
PROCESSING = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
}
# TransformerLens keeps an n_ctx x n_ctx mask in every layer: 2 GB for 30 layers of 8,192.
MAX_CONTEXT = 2048


def load(name: str, device: str, dtype: str) -> HookedTransformer:
    """`smollm2-135m` (embedded), a local Hugging Face folder, or a TransformerLens model name; value biases unfolded.

    Raises:
        ValueError: the name is none of the three, or the files cannot be loaded.
    """
    if name == embedded.NAME:
        return _load_folder(embedded.ensure(), device, dtype)
    if Path(name).is_dir():
        return _load_folder(Path(name), device, dtype)
    return _load_named(name, device, dtype)


def _load_named(name: str, device: str, dtype: str) -> HookedTransformer:
    try:
        tl_loading.get_official_model_name(name)
    except ValueError:
        raise ValueError(
            f"unknown model {name!r}: give {embedded.NAME!r}, a local Hugging Face folder, "
            "or a name that TransformerLens knows (gpt2-small, gelu-2l, pythia-70m, ...)"
        ) from None
    try:
        unfolded = {**PROCESSING, "fold_value_biases": False}
        return HookedTransformer.from_pretrained(name, device=device, dtype=dtype, **unfolded)
    except OSError as error:  # transformers and huggingface_hub raise OSError for files they cannot get
        raise ValueError(f"model {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def _load_folder(path: Path, device: str, dtype: str) -> HookedTransformer:
    """Load a Hugging Face folder, which TransformerLens' own loader takes only under an official name."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no Hugging Face model folder: it has no config.json")
    try:
        hf_model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model folder {path} could not be loaded: {str(error).splitlines()[0]}") from error
    # TransformerLens guesses the architecture from words in the path ("llama", "gemma") and then
    # wants an official name, so it is shown the folder under a neutral one.
    with TemporaryDirectory() as tmp:
        link = Path(tmp) / "model"
        link.symlink_to(path.resolve(), target_is_directory=True)
        try:
            cfg = tl_loading.get_pretrained_model_config(
                str(link), fold_ln=True, device=device, dtype=getattr(torch, dtype), hf_cfg=hf_model.config.to_dict()
            )
            state = tl_loading.get_pretrained_state_dict(str(link), cfg, hf_model, dtype=cfg.dtype)
        except (AttributeError, NotImplementedError, ValueError) as error:
            kind = type(hf_model).__name__
            raise ValueError(f"model folder {path}: TransformerLens cannot convert this {kind} ({error})") from error
    if cfg.positional_embedding_type == "rotary":  # TransformerLens leaves its default for unknown Llamas
        cfg.rotary_base = getattr(hf_model.config, "rope_theta", cfg.rotary_base)
        cfg.n_ctx = min(cfg.n_ctx, MAX_CONTEXT)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    # The same steps as load_and_process_state_dict, which loads key by key (10 s for 30 layers).
    state = model.fill_missing_keys(state)
    layer_norm = cfg.normalization_type == "LNPre"
    state = model.fold_layer_norm(state, fold_biases=layer_norm, center_weights=layer_norm)
    if layer_norm:
        state = model.center_writing_weights(state)
    model.load_state_dict(model.center_unembed(state), strict=False)
    model.move_model_modules_to_device()
    hf_model.to(device)  # type: ignore[arg-type]
    _check_same_model(model, hf_model, path)
    return model


def _check_same_model(model: HookedTransformer, hf_model: Any, path: Path) -> None:
    """Refuse a folder whose architecture TransformerLens only seems to know (other rotary scaling, ...)."""
    if model.cfg.dtype != torch.float32:
        return  # in half precision two correct implementations differ by more than a wrong one might
    tokens = torch.arange(16, device=model.W_E.device)[None] % model.cfg.d_vocab
    with torch.no_grad():
        ours, theirs = model(tokens), hf_model(tokens).logits
        difference = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    if not difference < 1e-2:
        raise ValueError(
            f"model folder {path}: TransformerLens computes other logits than Hugging Face "
            f"(log-probabilities differ by up to {difference:.3g}), so it is refused"
        )
