"""The language model: the only module that imports transformer_lens.

Everything else sees tokens `[batch, pos]`, head outputs `z [batch, pos, head, d_head]` and logits.
Grouped-query attention ends here: values come out once per query head.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as tl_loading
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer import embedded

# What loading does to the weights. An SAE is valid only for the z it was trained on, and `fold_value_biases`
# changes z, so the checkpoint records it.
PROCESSING = {
    "fold_ln": True,
    "center_writing_weights": True,
    "center_unembed": True,
    "fold_value_biases": True,
}

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of a byte-level BPE
# TransformerLens keeps an n_ctx x n_ctx mask in every layer: 2 GB for 30 layers of 8,192.
MAX_CONTEXT = 2048


def pick_device(name: str) -> str:
    """`auto` is the best device that is there.

    Raises:
        ValueError: torch cannot use the device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by backend
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


class Attention(NamedTuple):
    """What one attention layer did with a batch of tokens."""

    z: Float[Tensor, "batch pos head d_head"]
    v: Float[Tensor, "batch pos head d_head"]
    pattern: Float[Tensor, "batch head query source"]


class Forward(NamedTuple):
    """A whole forward: one attention layer, and the residual stream where it enters it and before the final norm."""

    attention: Attention
    resid_pre: Float[Tensor, "batch pos d_model"]
    final: Float[Tensor, "batch pos d_model"]


class _StopForward(Exception):
    """Raised inside a hook once everything asked for is there."""


class LanguageModel:
    """A TransformerLens model, reduced to what an attention-head SAE needs.

    Hooks live on the model, so every forward holds a lock: sessions of the app can share it.
    """

    def __init__(
        self, model: HookedTransformer, name: str, folded_b_V: list[Float[Tensor, "head d_head"]] | None = None
    ) -> None:
        model.eval().requires_grad_(False)
        self.model = model
        self._folded_b_V = folded_b_V
        self.name = name
        self.tokenizer = model.tokenizer
        self._lock = threading.RLock()

    @classmethod
    def load(cls, name: str, device: str = "cpu", dtype: str = "float32") -> "LanguageModel":
        """Load `smollm2-135m` (embedded), a local Hugging Face folder, or a TransformerLens model name.

        Raises:
            ValueError: the name is none of the three, or the files cannot be loaded.
        """
        if name == embedded.NAME:
            model = _load_folder(embedded.ensure(), device, dtype)
        elif Path(name).is_dir():
            model = _load_folder(Path(name), device, dtype)
        else:
            model = _load_named(name, device, dtype)
        # Both ways load value biases as they are: folded into the output bias they could not be told any more.
        b_V = [block.attn.b_V.detach().clone() for block in model.blocks]
        model.load_state_dict(model.fold_value_biases(model.state_dict()), strict=False)
        return cls(model, name, b_V)

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers

    @property
    def n_heads(self) -> int:
        return self.model.cfg.n_heads

    @property
    def d_head(self) -> int:
        return self.model.cfg.d_head

    @property
    def n_ctx(self) -> int:
        return self.model.cfg.n_ctx

    @property
    def d_vocab(self) -> int:
        return self.model.cfg.d_vocab

    @property
    def device(self) -> torch.device:
        return self.model.W_E.device

    def fingerprint(self) -> str:
        """A hash of the architecture and a sample of the weights that z depends on: another z, another hash."""
        cfg = self.model.cfg
        digest = hashlib.sha256(f"{cfg.rotary_base} {cfg.eps} {cfg.act_fn} {cfg.normalization_type}".encode())
        for key, parameter in self.model.named_parameters():
            if key.startswith(("ln_final", "unembed")):
                continue  # centring them sums in an order that depends on the machine
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
            digest.update(f"{key}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    def check_layer(self, layer: int) -> None:
        """Raise ValueError unless the model has this layer."""
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"hook_layer {layer} is out of range: {self.name} has layers 0 to {self.n_layers - 1}")

    def to_tokens(self, prompt: str) -> Int[Tensor, "1 pos"]:
        """Token ids of a prompt, BOS first.

        Raises:
            ValueError: the prompt is empty, or longer than the model's context.
        """
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError("the prompt is empty: type at least one token")
        tokens = torch.tensor([[self.tokenizer.bos_token_id, *ids]], device=self.device)
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens with BOS, but {self.name} reads at most {self.n_ctx}"
            )
        return tokens

    def token_strings(self, ids: list[int]) -> list[str]:
        """One readable string per token id; bytes that are no character alone show as `<D7>`."""
        texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        raw = self.tokenizer.convert_ids_to_tokens(ids)
        return [_bytes_of(r) if "\ufffd" in t or not t else t for t, r in zip(texts, raw, strict=True)]

    def hook_z(self, tokens: Int[Tensor, "batch pos"], layer: int) -> Float[Tensor, "batch pos head d_head"]:
        """Head outputs of one layer; nothing after the hook is computed."""
        return self.hook_z_of(tokens, [layer])[0]

    def hook_z_of(
        self, tokens: Int[Tensor, "batch pos"], layers: list[int]
    ) -> list[Float[Tensor, "batch pos head d_head"]]:
        """Head outputs of several layers in one forward, in the order of `layers`."""
        for layer in layers:
            self.check_layer(layer)
        names = [f"blocks.{layer}.attn.hook_z" for layer in sorted(layers)]
        got = self._capture(tokens, names)
        return [got[f"blocks.{layer}.attn.hook_z"] for layer in layers]

    def prefix(
        self, tokens: Int[Tensor, "batch pos"], layer: int
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos head d_head"]]:
        """The residual stream entering a layer and that layer's z: where `logits` continues from."""
        self.check_layer(layer)
        names = [f"blocks.{layer}.{name}" for name in ("hook_resid_pre", "attn.hook_z")]
        got = self._capture(tokens, names)
        return got[names[0]], got[names[1]]

    def attention(self, tokens: Int[Tensor, "batch pos"], layer: int) -> Attention:
        """z, values per query head, and the attention pattern of one layer."""
        return self._attention(tokens, layer, [], [])[0]

    def forward(self, tokens: Int[Tensor, "batch pos"], layer: int) -> Forward:
        """`attention`, and the residual stream before and after it, from one forward."""
        first, last = f"blocks.{layer}.hook_resid_pre", f"blocks.{self.n_layers - 1}.hook_resid_post"
        attention, got = self._attention(tokens, layer, [first], [last])
        return Forward(attention, got[first], got[last])

    def _attention(
        self, tokens: Tensor, layer: int, earlier: list[str], later: list[str]
    ) -> tuple[Attention, dict[str, Tensor]]:
        self.check_layer(layer)
        names = [f"blocks.{layer}.attn.{name}" for name in ("hook_v", "hook_pattern", "hook_z")]
        got = self._capture(tokens, earlier + names + later)
        v, pattern, z = (got[name] for name in names)
        v = v.repeat_interleave(self.n_heads // v.shape[2], dim=2)  # grouped-query attention
        return Attention(z, v, pattern), got

    def value_bias(self, layer: int) -> Float[Tensor, "head d_head"]:
        """b_V per query head; zero where loading folded it into the output bias."""
        return self.model.blocks[layer].attn.b_V.detach()

    def folded_value_bias(self, layer: int) -> Float[Tensor, "head d_head"]:
        """What z would have more if loading had not folded b_V into the output bias (attention rows sum to 1)."""
        if self._folded_b_V is None:
            return torch.zeros_like(self.value_bias(layer))
        return self._folded_b_V[layer].to(self.device)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes to the residual stream per unit of z.

        Raises:
            ValueError: the model normalises the attention output again, so that it is no linear map.
        """
        if getattr(self.model.cfg, "use_normalization_before_and_after", False):
            raise ValueError(f"{self.name} normalises attention outputs again: direct effects of heads are not defined")
        return self.model.blocks[layer].attn.W_O.detach()

    def unembed(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """What an addition to the final residual stream adds to the logits, times the scale of the final norm.

        Linear: centred where the norm is a LayerNorm, times its weight unless loading folded that, times W_U.
        """
        norm = getattr(self.model, "ln_final", None)
        if (self.model.cfg.normalization_type or "").startswith("LN"):
            resid = resid - resid.mean(-1, keepdim=True)
        if hasattr(norm, "w"):
            resid = resid * norm.w.detach()
        return resid @ self.model.W_U.detach()

    def logit_direction(self, token: int) -> Float[Tensor, " d_model"]:
        """The vector whose product with an addition to the final residual stream is `unembed` of it at `token`."""
        direction = self.model.W_U.detach()[:, token]
        norm = getattr(self.model, "ln_final", None)
        if hasattr(norm, "w"):
            direction = direction * norm.w.detach()
        if (self.model.cfg.normalization_type or "").startswith("LN"):
            direction = direction - direction.mean()
        return direction

    def final_scale(self, resid_pre: Float[Tensor, "batch pos d_model"], layer: int) -> Float[Tensor, "batch pos 1"]:
        """What the final norm divides by, in a run from `layer` on; 1 in a model without norms."""
        if self.model.cfg.normalization_type is None:
            return torch.ones_like(resid_pre[..., :1])
        return self._capture(resid_pre, ["ln_final.hook_scale"], layer)["ln_final.hook_scale"]

    def logits(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        layer: int,
        z: Float[Tensor, "batch pos head d_head"] | None = None,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model from `layer` on, with the layer's head outputs replaced by `z` if given.

        `layer` may be n_layers: only the final norm and the unembedding are left then.
        """
        with self._hooked(self._replacing(layer, z)):
            return self.model(resid_pre, start_at_layer=layer, return_type="logits")

    def final(
        self,
        resid_pre: Float[Tensor, "batch pos d_model"],
        layer: int,
        z: Float[Tensor, "batch pos head d_head"] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the final norm, run as by `logits`: to unembed only the positions one needs."""
        name = f"blocks.{self.n_layers - 1}.hook_resid_post"
        return self._capture(resid_pre, [name], layer, self._replacing(layer, z))[name]

    def _replacing(self, layer: int, z: Tensor | None) -> list[tuple[str, Callable]]:
        if z is None:
            return []
        return [(f"blocks.{layer}.attn.hook_z", lambda value, hook: z.to(value.dtype))]

    @contextmanager
    def _hooked(self, hooks: list[tuple[str, Callable]]) -> Iterator[None]:
        with self._lock, torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            yield

    def _capture(
        self,
        inputs: Tensor,
        names: list[str],
        start_at_layer: int | None = None,
        edits: Sequence[tuple[str, Callable]] = (),
    ) -> dict[str, Tensor]:
        """Values of some hooks, run from tokens or from a layer's residual stream; `names` in the order they fire."""
        got: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            got[hook.name] = value
            if hook.name == names[-1]:
                raise _StopForward

        with self._hooked([*edits, *((name, keep) for name in names)]), suppress(_StopForward):
            self.model(inputs.to(self.device), return_type=None, start_at_layer=start_at_layer)
        return got


def _bytes_of(raw: str) -> str:
    """A raw token with its bytes written out, where it is one of a byte-level BPE; else as it is (`<0xD7>`)."""
    if not all(c in _BYTES for c in raw):
        return raw
    return "".join(chr(b) if 32 <= b < 127 else f"<{b:02X}>" for b in (_BYTES[c] for c in raw))


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
    _check_same_model(model, hf_model.to(device), path)
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
