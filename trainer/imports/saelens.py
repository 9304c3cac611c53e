"""SAEs that SAELens saved, of any version: cfg.json beside sae_weights.safetensors.

    f = act((scale z - b_dec) W_enc + b_enc)          scale z_hat = (f * finetuning_scaling_factor) W_dec + b_dec

Also those of the reference (shehper/SAELens, branch block_diag_sae), whose weights are one pair of matrices per head.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from msgspec import Meta
from packaging.version import InvalidVersion, Version
from torch import Tensor

from trainer.config import require
from trainer.imports.described import check_shapes, checked, layer_of, read_json
from trainer.imports.trained import Trained
from trainer.imports.weights import read_safetensors
from trainer.recipes import gated

if TYPE_CHECKING:
    from sae_lens import SAE

_BIASES = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "topk": ("b_enc",),
    "batchtopk": ("b_enc",),
    "matryoshka_batchtopk": ("b_enc",),
    "gated": ("b_gate", "r_mag", "b_mag"),
    "block_diag": ("b_enc",),
}
# Until then it loaded models by `from_pretrained`, and from then on by `from_pretrained_no_processing`.
_NO_PROCESSING = Version("3.19.2")
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
# What names other weights than the model's own.
_OF_OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value")


class _Config(msgspec.Struct):
    d_in: Annotated[int, Meta(ge=1)]
    d_sae: Annotated[int, Meta(ge=1)]
    architecture: str = "standard"
    activation_fn: str | None = "relu"
    activation_fn_kwargs: dict[str, Any] | None = None
    k: float | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str | bool | None = None
    finetuning_scaling_factor: bool | None = None
    rescale_acts_by_decoder_norm: bool = False


class _Metadata(msgspec.Struct):
    hook_name: str | None = None
    hook_head_index: int | None = None
    model_name: str | None = None
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    sae_lens_training_version: str | None = None
    dataset_path: str | None = None
    context_size: Annotated[int, Meta(ge=2)] | None = None
    # Only SAEs that were exported from here say this.
    text_column: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    held_out_fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None
    recipe: str | None = None
    l1_coefficient: float | None = None
    k: int | None = None


def read(fetch: Callable[[str], Path], overrides: dict[str, Any] | None = None, scale: float | None = None) -> Trained:
    """Read a folder.

    Args:
        fetch: from the name of a file in it to its path here.
        overrides: of cfg.json.
        scale: of the inputs, where the folder does not say it.

    Raises:
        ValueError: a file is missing or damaged, or the SAE is not of hook_z or of an unknown architecture.
    """
    cfg = read_json(fetch("cfg.json")) | (overrides or {})
    expressible(cfg)
    return trained(cfg, read_safetensors(fetch("sae_weights.safetensors")), scale or _kept_scale(cfg, fetch))


def from_saelens(theirs: "SAE", scale: float | None = None) -> Trained:
    """A sae-lens object of hook_z, also one in training, whose inputs may be scaled by `scale`.

    Raises:
        ValueError: it cannot be expressed.
    """
    return trained(
        theirs.cfg.to_dict(), {name: p.detach().float().cpu() for name, p in theirs.state_dict().items()}, scale
    )


def expressible(cfg: dict[str, Any]) -> tuple[_Config, _Metadata]:
    """What cfg.json says, as far as an SAE for hook_z can be made of it.

    Raises:
        ValueError: it cannot, or an entry is missing or of a wrong type.
    """
    old = {_RENAMED.get(key, key): value for key, value in cfg.items()}
    described = checked(old, _Config)
    within = old.get("metadata", old)  # of one level until version 6
    require(isinstance(within, dict), "its metadata is no object")
    k = None if within is old else within.get("k")
    metadata = checked({_RENAMED.get(key, key): value for key, value in within.items()} | {"k": k}, _Metadata)
    layer_of(metadata.hook_name)
    head = metadata.hook_head_index
    require(head is None, f"it reads head {head} only, and an SAE here reconstructs all heads")
    if described.activation_fn == "topk" and described.architecture == "standard":
        described.architecture, described.activation_fn = "topk", "relu"
        described.k = (described.activation_fn_kwargs or {}).get("k")
    architecture, activation = described.architecture, described.activation_fn
    require(architecture in _BIASES, f"its architecture is {architecture}, not one of {', '.join(_BIASES)}")
    plain = activation in (None, "relu") or (architecture, activation) == ("topk", "topk")
    require(plain, f"its activation function is {activation} in the architecture {architecture}, which is unknown here")
    k = described.k
    require(
        architecture != "topk" or (isinstance(k, int | float) and k >= 1 and k == int(k)),
        f"its k is {k}, not a number of features",
    )
    return described, metadata


@torch.no_grad()
def trained(cfg: dict[str, Any], weights: dict[str, Tensor], scale: float | None = None) -> Trained:
    """An SAE of cfg.json and its weights in float32; `scale` of its inputs where cfg says that they were scaled.

    Raises:
        ValueError: it cannot be expressed, or the weights are not those of cfg.
    """
    described, metadata = expressible(cfg)
    architecture, d_in, d_sae = described.architecture, described.d_in, described.d_sae
    p = _of_full_blocks(weights) if architecture == "block_diag" else dict(weights)
    factor = p.pop("scaling_factor", p.pop("finetuning_scaling_factor", None))
    if "log_threshold" in p:
        p["threshold"] = p.pop("log_threshold").exp()
    expected = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    expected |= dict.fromkeys(_BIASES[architecture], (d_sae,))
    if "batchtopk" in architecture:
        expected["topk_threshold"] = ()
    check_shapes(p, expected)

    W_enc, W_dec, b_dec = p["W_enc"], p["W_dec"], p["b_dec"]
    threshold = p.get("threshold")
    if factor is not None:
        require(factor.shape == (d_sae,), f"its scaling factor is {list(factor.shape)}, not one of {d_sae} features")
        used = described.finetuning_scaling_factor is not False or bool((factor == 1).all())
        require(used, "it holds a finetuning_scaling_factor, and says that it has none")
        W_dec = W_dec * factor[:, None]
    subtracted = b_dec if described.apply_b_dec_to_input else torch.zeros_like(b_dec)  # from the encoder's input
    if architecture == "gated":
        params = {name: p[name][None] for name in ("W_enc", "r_mag", "b_mag")}
        folded = gated.for_use(params | {"b_enc": p["b_gate"][None], "b_dec": subtracted[None]}, torch.empty(0))
        W_enc, b_enc, threshold = (folded[name][0] for name in ("W_enc", "b_enc", "threshold"))
    else:
        b_enc = p["b_enc"] - subtracted @ W_enc
    if described.rescale_acts_by_decoder_norm:  # selected by, and counted in, |d_i| pre
        norm = W_dec.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    if "topk_threshold" in p:  # it becomes jumprelu when training ends
        threshold = p["topk_threshold"].expand_as(b_enc)

    k = int(described.k) if architecture == "topk" and described.k is not None else None
    return Trained(
        source=f"SAELens {architecture}",
        layer=layer_of(metadata.hook_name),
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        topk=k,
        scale=_scale(described.normalize_activations, scale),
        folds_value_biases=_folds_value_biases(metadata, "hook_point" in cfg),
        model=None if _has_other_weights(metadata) else metadata.model_name,
        dataset=metadata.dataset_path,
        text_column=metadata.text_column,
        dataset_config=metadata.dataset_config,
        dataset_split=metadata.dataset_split,
        context_size=metadata.context_size,
        held_out_fraction=metadata.held_out_fraction,
        recipe=metadata.recipe,
        l1_coefficient=metadata.l1_coefficient,
        k=metadata.k or k,
    )


def _of_full_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's linear maps of each head as matrices over all heads."""
    n_heads = sum(name.startswith("enc_blocks.") and name.endswith(".weight") for name in weights)
    names = {"W_enc": "enc_blocks.{}.weight", "b_enc": "enc_blocks.{}.bias",
             "W_dec": "dec_blocks.{}.weight", "b_dec": "dec_blocks.{}.bias"}  # fmt: skip
    each = {name: [weights.get(key.format(head)) for head in range(n_heads)] for name, key in names.items()}
    complete = 0 < n_heads == len(weights) / 4 and all(p is not None for ps in each.values() for p in ps)
    require(complete, "its weights are not those of one encoder and one decoder per head")
    found = {name: [p for p in ps if p is not None] for name, ps in each.items()}
    require(
        all(p.ndim == (2 if name.startswith("W_") else 1) for name, ps in found.items() for p in ps),
        "its weights are not matrices and biases per head",
    )
    return {
        name: torch.block_diag(*(p.T for p in ps)) if name.startswith("W_") else torch.cat(ps)
        for name, ps in found.items()
    }


def _folds_value_biases(metadata: _Metadata, is_before_3: bool) -> bool | None:
    """Whether the model was loaded with its value biases folded; None where the files do not tell."""
    loading = metadata.model_from_pretrained_kwargs or {}
    require(
        not loading.get("refactor_factored_attn_matrices"),
        "its model was loaded with refactor_factored_attn_matrices, which gives z other dimensions than it has here",
    )
    by_default = None
    with suppress(InvalidVersion, TypeError):
        by_default = Version(metadata.sae_lens_training_version or "") < _NO_PROCESSING
    if by_default is None:
        # The option that every version without processing writes.
        is_later = loading.get("center_writing_weights") is False
        by_default = True if is_before_3 else False if is_later else None
    folds = loading.get("fold_value_biases", by_default)
    require(folds in (True, False, None), f"its fold_value_biases is {folds!r}, neither true nor false")
    # Then the layer norm's bias still is in z, and only the value bias is not.
    partly = folds and not loading.get("fold_ln", by_default if by_default is not None else True)
    require(not partly, "its model was loaded with value biases folded and layer norms not, which is unknown here")
    return folds


def _has_other_weights(metadata: _Metadata) -> bool:
    """Whether it was trained on a checkpoint of its model, which its name does not give."""
    return any((metadata.model_from_pretrained_kwargs or {}).get(key) is not None for key in _OF_OTHER_WEIGHTS)


def _scale(normalize: str | bool | None, scale: float | None) -> float | None:
    """The factor of the inputs, None where it is lost."""
    if normalize in (None, False, "none"):
        return 1.0
    require(
        normalize in (True, "expected_average_only_in"),
        f"its inputs were normalised ({normalize}), each by itself, which an SAE here cannot do",
    )
    return _positive(scale)


def _kept_scale(cfg: dict[str, Any], fetch: Callable[[str], Path]) -> float | None:
    """Of an SAE still in training: since version 6 in JSON, from 5.2 on with the state of its activations."""
    if cfg.get("normalize_activations") != "expected_average_only_in":
        return None
    with suppress(FileNotFoundError):
        return _positive(read_json(fetch("activation_scaler.json")).get("scaling_factor"))
    with suppress(FileNotFoundError):
        kept = read_safetensors(fetch("activations_store_state.safetensors"), only="estimated_norm_scaling_factor")
        return _positive(next((float(value) for value in kept.values()), None))
    return None


def _positive(scale: Any) -> float | None:
    require(
        scale is None or (isinstance(scale, float | int) and 0 < scale < float("inf")), f"its input scale is {scale}"
    )
    return scale
