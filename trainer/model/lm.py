"""The language model as the rest sees it; this folder alone imports transformer_lens.

Everything else sees tokens `[batch, pos]`, head outputs `z [batch, pos, head, d_head]` and logits.
Grouped-query attention ends here: values come out once per query head.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import isclose
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerKeyValueCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trainer.errors import first_line
from trainer.kernels import workers
from trainer.model import loading, positions
from trainer.model.tokens import token_ids

_PART_TOKENS = 512  # of one thread at a time on a CPU
_COLUMNS = 8192  # of an unembedding in half precision that are float32 at a time: Gemma's whole has gigabytes
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of a byte-level BPE


def leave_cores() -> None:
    """Compute on half of the processor's cores from now on, where something else (a browser) wants some too.

    The threads of a small matmul wait for each other, and so for whatever takes the core of one.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


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
        raise ValueError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return name


Edit = Callable[[Tensor, slice], Tensor]  # a value, and which rows of the batch it is of, to what stands in its place


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


def _unusual(cfg: Any) -> list[tuple[str, Any]]:
    """Scalars of a configuration that few models have: those of the others are hashed as if there were none.

    Windows (GPT-Neo) and partly rotated heads (Pythia) are left out: checkpoints of such models have no other hash.
    """
    names = [name for name in ("attn_scores_soft_cap", "output_logits_soft_cap") if getattr(cfg, name) > 0]
    if cfg.attn_scale > 0 and not isclose(cfg.attn_scale, cfg.d_head**0.5):
        names.append("attn_scale")
    if cfg.rotary_base_local is not None:
        names.append("rotary_base_local")
    if cfg.use_NTK_by_parts_rope:
        of_rope = ("factor", "low_freq_factor", "high_freq_factor")
        names += [*(f"NTK_by_parts_{name}" for name in of_rope), "NTK_original_ctx_len"]
    return [(name, getattr(cfg, name)) for name in names]


class LanguageModel:
    """A TransformerLens model, reduced to what an attention-head SAE needs; `layer(17)` is bound to one layer.

    Hooks live on the model, so every forward holds a lock: sessions of the app can share it.
    """

    def __init__(
        self, model: HookedTransformer, name: str, folded_b_V: list[Float[Tensor, "head d_head"]] | None = None
    ) -> None:
        model.eval().requires_grad_(False)
        self.model = model
        self.folded_b_V = folded_b_V
        self.name = name
        self.tokenizer: Any = model.tokenizer
        self._lock = threading.RLock()

    @classmethod
    def load(cls, name: str, device: str = "cpu", dtype: str = "float32") -> "LanguageModel":
        """Load `smollm2-135m` (embedded), a local Hugging Face folder, or a TransformerLens model name.

        Raises:
            ValueError: the name is none of the three, or the files cannot be loaded.
        """
        name = loading.located(name)
        model = loading.load(name, device, dtype)
        # Folded into the output bias they could not be told any more.
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

    @property
    def dtype(self) -> str:
        """Of the weights, as `load` takes it."""
        return str(self.model.cfg.dtype).removeprefix("torch.")

    @property
    def weights_dtype(self) -> torch.dtype:
        """That of the weights and of the residual stream."""
        return self.model.cfg.dtype

    @property
    def final_hook(self) -> str:
        """Name of the hook on the residual stream before the final norm."""
        return f"blocks.{self.n_layers - 1}.hook_resid_post"

    def fingerprint(self) -> str:
        """A hash of the architecture and a sample of the weights that z depends on: another z, another hash.

        Of what comes after z only the soft cap of the logits is part of it.
        """
        cfg = self.model.cfg
        digest = hashlib.sha256(f"{cfg.rotary_base} {cfg.eps} {cfg.act_fn} {cfg.normalization_type}".encode())
        digest.update("".join(f" {name} {value}" for name, value in _unusual(cfg)).encode())
        for key, parameter in self.model.named_parameters():
            if key.startswith(("ln_final", "unembed")):
                continue  # centring them sums in an order that depends on the machine
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
            digest.update(f"{key}{tuple(parameter.shape)}{parameter.dtype}".encode())
            digest.update(sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    def layer(self, index: int) -> "Layer":
        """One attention layer.

        Raises:
            ValueError: the model has no such layer.
        """
        return Layer(self, index)

    def to_tokens(self, prompt: str) -> Int[Tensor, "1 pos"]:
        """Token ids of a prompt, BOS first; special tokens that it spells are text.

        Raises:
            ValueError: the prompt is empty, or longer than the model's context.
        """
        ids = token_ids(self.tokenizer, prompt)
        if not ids:
            raise ValueError("the prompt is empty: type at least one token")
        tokens = torch.tensor([[self.tokenizer.bos_token_id, *ids]], device=self.device)
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(
                f"the prompt has {tokens.shape[1]} tokens with BOS, but {self.name} reads at most {self.n_ctx}"
            )
        return tokens

    def single_token(self, text: str) -> int:
        """The id of a text that is one token, as it stands in a prompt: with its leading space.

        Raises:
            ValueError: the text is no single token.
        """
        ids = token_ids(self.tokenizer, text)
        if len(ids) != 1:
            parts = ", ".join(map(repr, self.token_strings(ids)))
            raise ValueError(
                f"{text!r} is {len(ids)} tokens of {self.name} and not one: [{parts}] "
                "(the space before a word belongs to its token)"
            )
        return ids[0]

    def token_strings(self, ids: list[int]) -> list[str]:
        """One readable string per token id: `<D7>` for bytes that are no character alone, `<50300>` for no token."""
        texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        raw = self.tokenizer.convert_ids_to_tokens(ids)
        readable = [_bytes_of(r) if r and ("\ufffd" in t or not t) else t for t, r in zip(texts, raw, strict=True)]
        return [text or f"<{i}>" for text, i in zip(readable, ids, strict=True)]

    def enter(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters the first layer, from which `Layer.step` goes on."""
        return self.capture(tokens, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]

    def embeddings(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """Rows of the token embedding."""
        return self.model.W_E[tokens.to(self.device)].detach()

    def z_of(self, tokens: Int[Tensor, "batch pos"], layers: list[int]) -> list[Float[Tensor, "batch pos head d_head"]]:
        """Head outputs of several layers in one forward, in the order of `layers`; what comes after is not computed."""
        names = [f"blocks.{layer}.attn.hook_z" for layer in layers]
        got = self.capture(tokens, sorted(names, key=lambda name: layers[names.index(name)]))
        return [got[name] for name in names]

    def attentions(
        self, tokens: Int[Tensor, "batch pos"], layers: Iterable[int]
    ) -> Iterator[tuple["Layer", "Attention"]]:
        """What some attention layers do, one after the other from one forward; only one is held at a time."""
        wanted = sorted(set(layers))
        inputs: Tensor = tokens
        start = None
        for layer, after in zip(wanted, [*wanted[1:], None], strict=True):
            goes_on = [] if after is None else [f"blocks.{after}.hook_resid_pre"]
            here = self.layer(layer)
            attention, got = here._attention(inputs, [], goes_on, start)
            if after is not None:
                inputs, start = got[goes_on[0]], after
            del got
            yield here, attention

    def unembed(self, resid: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """What an addition to the final residual stream adds to the logits, times the scale of the final norm.

        Linear: centred where the norm is a LayerNorm, times its weight unless loading folded that, times W_U; in the
        precision of `resid`.
        """
        norm: Any = getattr(self.model, "ln_final", None)
        if (self.model.cfg.normalization_type or "").startswith("LN"):
            resid = resid - resid.mean(-1, keepdim=True)
        if hasattr(norm, "w"):
            resid = resid * norm.w.detach()
        W_U = self.model.W_U.detach()
        if resid.dtype == W_U.dtype:
            return resid @ W_U
        return torch.cat([resid @ part.to(resid.dtype) for part in W_U.split(_COLUMNS, dim=1)], -1)

    def logit_direction(self, token: int) -> Float[Tensor, " d_model"]:
        """The vector whose product with an addition to the final residual stream is `unembed` of it at `token`."""
        direction = self.model.W_U.detach()[:, token]
        norm: Any = getattr(self.model, "ln_final", None)
        if hasattr(norm, "w"):
            direction = direction * norm.w.detach()
        if (self.model.cfg.normalization_type or "").startswith("LN"):
            direction = direction - direction.mean()
        return direction

    def final_scale(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 1"]:
        """What the final norm divides a final residual stream by; 1 in a model without norms."""
        if self.model.cfg.normalization_type is None:
            return torch.ones_like(final[..., :1])
        return self.capture(final, ["ln_final.hook_scale"], self.n_layers)["ln_final.hook_scale"]

    def logits(self, final: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """The final norm and the unembedding of a final residual stream."""
        return self.run_from(final, self.n_layers)

    def logits_plus(
        self, logits: Float[Tensor, "... d_vocab"], change: Float[Tensor, "... d_vocab"]
    ) -> Float[Tensor, "... d_vocab"]:
        """Logits after an addition to what the soft cap is taken of, in a model that has one (Gemma 2)."""
        cap = self.model.cfg.output_logits_soft_cap
        if cap <= 0:
            return logits + change
        tanh = (change / cap).tanh()  # by the addition theorem: the inverse is lost where the cap is reached
        return (logits + cap * tanh) / (1 + logits * tanh / cap)

    def run_from(
        self, resid_pre: Float[Tensor, "batch pos d_model"], layer: int, edits: Sequence[tuple[str, Edit]] = ()
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits, run from the residual stream that enters a layer, some values replaced as `edits` say."""
        everything = slice(0, len(resid_pre))
        with self._hooked([(name, _of(edit, lambda: everything)) for name, edit in edits]):
            positions.reach(self.model, resid_pre.shape[1])
            return self.model(resid_pre, start_at_layer=layer, return_type="logits")

    def capture(
        self,
        inputs: Tensor,
        names: Sequence[str],
        start_at_layer: int | None = None,
        edits: Sequence[tuple[str, Edit]] = (),
        past: HookedTransformerKeyValueCache | None = None,
    ) -> dict[str, Tensor]:
        """Values of some hooks, run from tokens or from a layer's residual stream; `names` in the order they fire.

        On a CPU threads run parts of the batch side by side.

        Args:
            past: of earlier positions (`no_past`, `Frozen.before`); `inputs` come after them, and are added to it.
        """
        cached: dict[str, Any] = {} if past is None else {"past_kv_cache": past}
        if past is not None and start_at_layer is None:  # else TransformerLens would mask what looks like padding
            cached["attention_mask"] = torch.ones_like(inputs)
        before = 0 if past is None else past[0].past_keys.shape[1]
        mine = threading.local()  # hooks live on the model: each thread has its own rows and values

        def keep(value: Tensor, hook: Any) -> None:
            mine.got[hook.name] = value
            if hook.name == names[-1]:
                raise _StopForward

        def run(rows: slice) -> dict[str, Tensor]:
            mine.rows, mine.got = rows, {}
            with torch.no_grad(), suppress(_StopForward):
                self.model(inputs[rows].to(self.device), return_type=None, start_at_layer=start_at_layer, **cached)
            return mine.got

        hooks = [*((name, _of(edit, lambda: mine.rows)) for name, edit in edits), *((name, keep) for name in names)]
        with self._hooked(hooks):
            positions.reach(self.model, before + inputs.shape[1])
            got = workers.each(run, self._parts(inputs) if past is None else [slice(0, len(inputs))])
        return got[0] if len(got) == 1 else {name: torch.cat([part[name] for part in got]) for name in names}

    def gradients(
        self,
        inputs: Tensor,
        names: Sequence[str],
        of: tuple[str, Callable[[Tensor], Tensor]],
        start_at_layer: int | None = None,
        edits: Sequence[tuple[str, Edit]] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """A number for each row of a batch, made of one hook's value, and its gradient by the values of other hooks.

        Args:
            of: the name of a hook that fires after `names`, and what makes `[batch]` numbers of its value.
        """
        leaves: dict[str, Tensor] = {}
        numbers: list[Tensor] = []

        def add(value: Tensor, hook: Any) -> Tensor:
            leaves[hook.name] = torch.zeros_like(value, requires_grad=True)
            return value + leaves[hook.name]

        def end(value: Tensor, hook: Any) -> None:
            numbers.append(of[1](value))
            raise _StopForward

        everything = slice(0, len(inputs))
        hooks = [(name, _of(edit, lambda: everything)) for name, edit in edits]
        with self._hooked([*hooks, *((name, add) for name in names), (of[0], end)]), torch.enable_grad():
            positions.reach(self.model, inputs.shape[1])
            with suppress(_StopForward):
                self.model(inputs.to(self.device), return_type=None, start_at_layer=start_at_layer)
            found = torch.autograd.grad(numbers[0].sum(), [leaves[name] for name in names])
        return numbers[0].detach(), [gradient.detach() for gradient in found]

    def next_logits(self, final: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """The final norm, the unembedding and the soft cap, of some positions; it can be differentiated."""
        norm: Any = getattr(self.model, "ln_final", None)
        logits = self.model.unembed(final if norm is None else norm(final))
        cap = self.model.cfg.output_logits_soft_cap
        return cap * (logits / cap).tanh() if cap > 0 else logits

    def _parts(self, inputs: Tensor) -> list[slice]:
        """Rows of a batch that run at a time, as many as there are threads or more; all where there are too few."""
        batch, length = inputs.shape[:2]
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        size = batch if batch < threads or threads == 1 else max(1, min(batch // threads, _PART_TOKENS // length))
        return [slice(begin, begin + size) for begin in range(0, batch, size)]

    def no_past(self, batch: int) -> HookedTransformerKeyValueCache:
        """Keys and values of no position yet, for `Layer.edited` to run on from."""
        return HookedTransformerKeyValueCache.init_cache(self.model.cfg, self.device, batch)

    @contextmanager
    def _hooked(self, hooks: Sequence[tuple[str, Callable]]) -> Iterator[None]:
        # TransformerLens' `hooks` takes milliseconds to look for hooks in all hook points; ours are where we put them.
        level, points = self.model.context_level + 1, self.model.hook_dict
        with self._lock, torch.no_grad():
            try:
                for name, hook in hooks:
                    self.model.add_hook(name, hook, level=level)
                yield
            finally:
                for name, _ in hooks:
                    points[name].remove_hooks(level=level)


class Layer:
    """One attention layer of a language model: what it computes on tokens, and the model run on from it.

    Raises:
        ValueError: the model has no such layer.
    """

    def __init__(self, lm: LanguageModel, index: int) -> None:
        if not 0 <= index < lm.n_layers:
            raise ValueError(f"hook_layer {index} is out of range: {lm.name} has layers 0 to {lm.n_layers - 1}")
        self.lm, self.index = lm, index
        self.n_heads, self.d_head, self.device = lm.n_heads, lm.d_head, lm.device
        self.hook_name = f"blocks.{index}.attn.hook_z"
        self._post_norm: Any = getattr(lm.model.blocks[index], "ln1_post", None)
        self._resid_pre, self._resid_post = f"blocks.{index}.hook_resid_pre", f"blocks.{index}.hook_resid_post"
        self._final = lm.final_hook

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value bias per query head; zero where loading folded it into the output bias."""
        return self.lm.model.blocks[self.index].attn.b_V.detach()

    @property
    def folded_b_V(self) -> Float[Tensor, "head d_head"]:
        """What z would have more if loading had not folded b_V into the output bias (attention rows sum to 1)."""
        folded = self.lm.folded_b_V
        return torch.zeros_like(self.b_V) if folded is None else folded[self.index].to(self.device)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes to the residual stream per unit of z, times the position's `output_scale`."""
        W_O = self.lm.model.blocks[self.index].attn.W_O.detach()
        return W_O if self._post_norm is None else W_O.float() * self._post_norm.w.detach().float()

    def output_scale(self, resid_pre: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 1"]:
        """What a norm divides the output of all heads by before it is added (Gemma 2 and 3); 1 without one."""
        if self._post_norm is None:
            return torch.ones_like(resid_pre[..., :1])
        name = f"blocks.{self.index}.ln1_post.hook_scale"
        return self.lm.capture(resid_pre, [name], self.index)[name]

    def z(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos head d_head"]:
        """Head outputs; nothing after the hook is computed."""
        return self.lm.capture(tokens, [self.hook_name])[self.hook_name]

    def attention(self, tokens: Int[Tensor, "batch pos"]) -> Attention:
        """z, values per query head, and the attention pattern."""
        return self._attention(tokens, [], [])[0]

    def step(
        self, resid_pre: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Attention, Float[Tensor, "batch pos d_model"]]:
        """What the layer does with the residual stream that enters it, and what leaves it for the next layer."""
        attention, got = self._attention(resid_pre, [], [self._resid_post], self.index)
        return attention, got[self._resid_post]

    def prefix(
        self, tokens: Int[Tensor, "batch pos"]
    ) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos head d_head"]]:
        """The residual stream entering the layer and its z: where `logits` continues from."""
        got = self.lm.capture(tokens, [self._resid_pre, self.hook_name])
        return got[self._resid_pre], got[self.hook_name]

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Forward:
        """`attention`, and the residual stream before and after it, from one forward."""
        attention, got = self._attention(tokens, [self._resid_pre], [self._final])
        return Forward(attention, got[self._resid_pre], got[self._final])

    def logits(
        self, resid_pre: Float[Tensor, "batch pos d_model"], z: Float[Tensor, "batch pos head d_head"] | None = None
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model from this layer on, with its head outputs replaced by `z` if given."""
        return self.lm.run_from(resid_pre, self.index, self.replacing(z))

    def final(
        self, resid_pre: Float[Tensor, "batch pos d_model"], z: Float[Tensor, "batch pos head d_head"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the final norm, run as by `logits`: to unembed only the positions one needs."""
        return self.lm.capture(resid_pre, [self._final], self.index, self.replacing(z))[self._final]

    def edited(
        self,
        tokens: Int[Tensor, "batch pos"],
        edit: Callable[[Tensor], Tensor],
        past: HookedTransformerKeyValueCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before the final norm, run from tokens with `edit` of this layer's z in place of z.

        Args:
            edit: is given whole contexts, not always all of them.
            past: of the positions before `tokens` (`LanguageModel.no_past`), to which these are added.
        """
        edits = [(self.hook_name, lambda z, rows: edit(z).to(z.dtype))]
        return self.lm.capture(tokens, [self._final], edits=edits, past=past)[self._final]

    def _attention(
        self, inputs: Tensor, earlier: list[str], later: list[str], start_at_layer: int | None = None
    ) -> tuple[Attention, dict[str, Tensor]]:
        names = [f"blocks.{self.index}.attn.{name}" for name in ("hook_v", "hook_pattern", "hook_z")]
        got = self.lm.capture(inputs, earlier + names + later, start_at_layer)
        v, pattern, z = (got[name] for name in names)
        v = v.repeat_interleave(self.n_heads // v.shape[2], dim=2)  # grouped-query attention
        return Attention(z, v, pattern), got

    def replacing(self, z: Float[Tensor, "batch pos head d_head"] | None) -> list[tuple[str, Edit]]:
        """The edits that put `z` in place of this layer's."""
        return [] if z is None else [(self.hook_name, lambda value, rows: z[rows].to(value.dtype))]


def _of(edit: Edit, rows: Callable[[], slice]) -> Callable[[Tensor, Any], Tensor]:
    """An edit as TransformerLens calls it."""
    return lambda value, hook: edit(value, rows())


def _bytes_of(raw: str) -> str:
    """A raw token with its bytes written out, where it is one of a byte-level BPE; else as it is (`<0xD7>`)."""
    if not all(c in _BYTES for c in raw):
        return raw
    return "".join(chr(b) if 32 <= b < 127 else f"<{b:02X}>" for b in (_BYTES[c] for c in raw))
