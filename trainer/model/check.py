"""Whether a converted model computes what Hugging Face computes: log-probabilities and hook_z, at every position."""

import hashlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from trainer.files import cache_dir, write_json
from trainer.model import positions

_POSITIONS = 4096  # of the first layers, as far as every kind of attention is among them
_DEEP = 512  # of the whole model, where a right one drifts by rounding: 1e-3
_TOLERANCE = 1e-2  # in float32; a wrong rotary scale or window is off by 0.1 and more
# What a head's output goes into, in the architectures that TransformerLens knows.
_OUTPUT = re.compile(r"\.(self_)?attn\.(o_proj|c_proj|out_proj|dense)$|\.(self_)?attention\.(dense|out_proj)$")


def check_same_model(model: HookedTransformer, hf_model: Any, n_ctx: int, folder: Path) -> None:
    """Refuse a folder of which TransformerLens makes another model (a rotary scaling that it does not know, ...).

    Both in float32, where right and wrong are far apart; the verdict on a folder is kept beside the cached activations.

    Raises:
        ValueError: the two differ.
    """
    verdict = cache_dir() / "checked" / f"{_key(folder)}.json"
    if verdict.exists():
        return
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, min(n_ctx, _POSITIONS)), generator=random).to(model.W_E.device)
    positions.reach(model, tokens.shape[1])
    with torch.no_grad():
        of_z = max(
            _head_outputs(model, hf_model, tokens, _one_of_each_kind(model, hf_model)),
            _head_outputs(model, hf_model, tokens[:, :_DEEP], model.cfg.n_layers),
        )
        ours, theirs = (m(tokens[:, :_DEEP]) for m in (model, lambda t: hf_model(t, use_cache=False).logits))
    of_logits = _largest(ours.log_softmax(-1) - theirs.log_softmax(-1))
    for what, difference in (("head outputs", of_z), ("log-probabilities", of_logits)):
        if not difference < _TOLERANCE:
            raise ValueError(
                f"model folder {folder}: TransformerLens computes other {what} than Hugging Face "
                f"(they differ by up to {difference:.3g}), so it is refused"
            )
    try:
        verdict.parent.mkdir(parents=True, exist_ok=True)
        write_json(verdict, {"folder": str(folder), "head outputs": of_z, "log-probabilities": of_logits})
    except OSError:
        return  # it is compared again the next time


class _Enough(Exception):
    """Raised inside a hook after the last layer that is compared."""


def _one_of_each_kind(model: HookedTransformer, hf_model: Any) -> int:
    """How many layers from the first on have every kind of attention (global, within a window) among them."""
    cfg = model.cfg
    ours = cfg.attn_types if cfg.use_local_attn and cfg.attn_types else ["global"] * cfg.n_layers
    kinds = list(zip(getattr(hf_model.config, "layer_types", None) or ours, ours, strict=False))
    return max(kinds.index(kind) for kind in set(kinds)) + 1


def _head_outputs(model: HookedTransformer, hf_model: Any, tokens: Int[Tensor, "1 pos"], n_layers: int) -> float:
    """The largest difference of z in the first layers, in units of a layer's root mean square.

    0 of an architecture whose output projections have other names: log-probabilities have to do there.
    """
    outputs = [module for name, module in hf_model.named_modules() if _OUTPUT.search(f".{name}")]
    if len(outputs) != model.cfg.n_layers:
        return 0.0
    theirs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        theirs.append(args[0])
        if len(theirs) == n_layers:
            raise _Enough

    hooks = [each.register_forward_pre_hook(keep) for each in outputs]
    try:
        hf_model(tokens, use_cache=False)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(n_layers)]
    _, ours = model.run_with_cache(tokens, return_type=None, names_filter=names, stop_at_layer=n_layers)
    return max(
        _largest(ours[name].flatten(2) - z) / z.pow(2).mean().sqrt().item()
        for name, z in zip(names, theirs, strict=True)
    )


def _largest(difference: Tensor) -> float:
    return difference.abs().max().nan_to_num(torch.inf).item()


def _key(folder: Path) -> str:
    """A name for the files of a folder as they are, and for the libraries that read them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    versions = [version(name) for name in ("torch", "transformers", "transformer-lens")]
    return hashlib.sha256(repr((str(folder.resolve()), stats, versions)).encode("utf-8", "replace")).hexdigest()[:16]
