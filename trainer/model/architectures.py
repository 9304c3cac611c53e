"""What TransformerLens has to be told of a Hugging Face architecture: its own reading of a folder leaves parts out."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig
from transformer_lens import loading_from_pretrained as tl_loading

_GEMMA = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"}


def n_ctx(hf: Any) -> int | None:
    """Positions that a model was made for, or None where its configuration sets no limit."""
    limits = (getattr(hf, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((limit for limit in limits if limit), None)


def config(hf: Any, architecture: str, device: str) -> HookedTransformerConfig:
    """The TransformerLens configuration of a Hugging Face one, in float32, to be folded.

    Raises:
        NotImplementedError: TransformerLens does not know the architecture.
    """
    cfg = _gemma(hf, architecture) if architecture in _GEMMA else _converted(hf, architecture)
    experts = (cfg.get("num_experts") or 1) > 1
    folded = {"LN": "LNPre", "RMS": "RMSPre"}
    cfg |= _rotary(hf, cfg) | {"device": device, "dtype": torch.float32, "init_weights": False}
    cfg["d_mlp"] = getattr(hf, "n_inner", None) or getattr(hf, "intermediate_size", None) or cfg["d_mlp"]
    if not experts:  # their norms cannot be folded
        cfg["normalization_type"] = folded.get(cfg["normalization_type"], cfg["normalization_type"])
    if cfg.get("attn_types") is not None and architecture == "MixtralForCausalLM":
        window = getattr(hf, "sliding_window", None)
        kind = "local" if window else "global"
        cfg |= {"attn_types": [kind] * cfg["n_layers"], "use_local_attn": bool(window), "window_size": window}
    return HookedTransformerConfig.from_dict(cfg)


def _converted(hf: Any, architecture: str) -> dict[str, Any]:
    """TransformerLens' own reading of a folder, of which it sees the configuration alone."""
    # It guesses the architecture from words in the path ("llama", "gemma") and then wants an official name, so the
    # path is a neutral one; and it reads `n_ctx` of GPT-2, which transformers has not written for years.
    with TemporaryDirectory() as tmp:
        folder = Path(tmp) / "model"
        if architecture == "GPT2LMHeadModel":
            hf.n_ctx = hf.n_positions
        hf.save_pretrained(folder)
        return tl_loading.get_pretrained_model_config(str(folder), hf_cfg=hf.to_dict()).to_dict()


def _rotary(hf: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    """Base, scaling and width of a rotary embedding, and the width of a head that is none of d_model / n_heads."""
    if cfg["positional_embedding_type"] != "rotary":
        return {}
    told: dict[str, Any] = {}
    head = getattr(hf, "head_dim", None)
    if head and head != cfg["d_head"]:
        told |= {"d_head": head, "attn_scale": head**0.5}
        told["rotary_dim"] = head if cfg["rotary_dim"] == cfg["d_head"] else cfg["rotary_dim"]
    parameters = getattr(hf, "rope_parameters", None) or {}  # where transformers 5 keeps them
    base = parameters.get("rope_theta") or getattr(hf, "rope_theta", None) or getattr(hf, "rotary_emb_base", None)
    if base:
        told["rotary_base"] = base
    scaling = getattr(hf, "rope_scaling", None) or parameters
    if (scaling.get("rope_type") or scaling.get("type")) == "llama3":
        told |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": scaling["factor"],
            "NTK_by_parts_low_freq_factor": scaling["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": scaling["high_freq_factor"],
            "NTK_original_ctx_len": scaling["original_max_position_embeddings"],
        }
    return told


def _gemma(hf: Any, architecture: str) -> dict[str, Any]:
    """Gemma 1 to 3, which TransformerLens knows by name alone."""
    cfg = HookedTransformerConfig(
        d_model=hf.hidden_size,
        d_head=hf.head_dim,
        n_heads=hf.num_attention_heads,
        d_mlp=hf.intermediate_size,
        n_layers=hf.num_hidden_layers,
        n_ctx=hf.max_position_embeddings,
        eps=hf.rms_norm_eps,
        d_vocab=hf.vocab_size,
        act_fn=getattr(hf, "hidden_activation", None) or hf.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=hf.head_dim,
        n_key_value_heads=hf.num_key_value_heads,
        gated_mlp=True,
        final_rms=True,
        init_weights=False,
        original_architecture=architecture,
        **({} if architecture == "GemmaForCausalLM" else _gemma_2(hf, architecture)),
    )
    return cfg.to_dict()


def _gemma_2(hf: Any, architecture: str) -> dict[str, Any]:
    """What Gemma 2 and 3 have more: norms after the sublayers, sliding windows, a scale of attention of their own."""
    more: dict[str, Any] = {
        "use_normalization_before_and_after": True,
        "use_local_attn": True,
        "window_size": hf.sliding_window,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in hf.layer_types],
        "attn_scale": hf.query_pre_attn_scalar**0.5,
    }
    for name, ours in (("attn_logit_softcapping", "attn_scores"), ("final_logit_softcapping", "output_logits")):
        more[f"{ours}_soft_cap"] = getattr(hf, name, None) or -1.0
    if architecture == "Gemma3ForCausalLM":
        more |= {"use_qk_norm": True, "rotary_base_local": hf.rope_local_base_freq}
    return more
