"""What a circuit is to explain: one number of a prompt, and what every node adds to it, at first order and in truth."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analysis.prompt.circuit.nodes import Nodes
from trainer.config import require

_BATCH_TOKENS = 2048  # of a forward that runs several nodes' removals


@dataclass(frozen=True)
class Target:
    """A number that the model computes on a prompt at one position.

    With `token` a logit of the next token: less that of `against`, if one is named; its log probability if
    `log_probability`. With `feature` the pre-activation of a feature of the SAE of `layer`.
    """

    position: int
    token: int | None = None
    against: int | None = None
    log_probability: bool = False
    layer: int | None = None
    feature: int | None = None

    def __post_init__(self) -> None:
        require((self.token is None) != (self.feature is None), "a target is a token or a feature")
        require((self.layer is None) == (self.feature is None), "a feature has a layer")
        plain = self.against is None or not self.log_probability
        require(plain, "a log probability is of one token: it is not compared with another")


class Number:
    """A target on a prompt: where the model computes it, and from what.

    Raises:
        ValueError: the prompt has no such position, the model no such token, or its layer no such feature.
    """

    def __init__(self, nodes: Nodes, target: Target) -> None:
        lm, length = nodes.frozen.lm, len(nodes.frozen.tokens)
        require(0 < target.position < length, f"position {target.position} is none of 1 to {length - 1}")
        for token in (target.token, target.against):
            require(token is None or 0 <= token < lm.d_vocab, f"there is no token {token}")
        if target.layer is not None and target.feature is not None:
            sae = nodes.saes.get(target.layer)
            require(sae is not None, f"layer {target.layer} has no SAE here")
            assert sae is not None
            require(0 <= target.feature < sae.d_sae, f"there is no feature {target.feature} of layer {target.layer}")
        self.nodes, self.target, self._lm = nodes, target, lm
        self.n_layers = lm.n_layers if target.layer is None else target.layer  # that can matter to it
        self.hook = lm.final_hook if target.layer is None else lm.layer(target.layer).hook_name

    def of(self, value: Float[Tensor, "batch pos ..."], first: int = 0) -> Float[Tensor, " batch"]:
        """The number, from the final residual stream or from z of the feature's layer, at positions from `first` on."""
        target, here = self.target, value[:, self.target.position - first]
        if target.layer is None or target.feature is None:
            logits = self._lm.next_logits(here).to(self.nodes.frozen.dtype)
            if target.log_probability:
                return logits.log_softmax(-1)[:, target.token]
            return logits[:, target.token] - (0 if target.against is None else logits[:, target.against])
        sae = self.nodes.saes[target.layer]
        block, index = divmod(target.feature, sae.features_per_block)
        z = sae.blocks(here.to(self.nodes.frozen.dtype))[:, block]
        return z @ sae.W_enc.detach()[block, :, index] + sae.b_enc.detach()[block, index]

    def value(self) -> float:
        """On the prompt as it is."""
        frozen = self.nodes.frozen
        value = frozen.final if self.target.layer is None else frozen.layers[self.target.layer].z
        with torch.no_grad():
            return self.of(value[None].to(self._lm.weights_dtype))[0].item()

    def gradient(self, steps: int = 0) -> list[Float[Tensor, "pos head d_head"]]:
        """By z of each layer that can matter, at every position.

        Args:
            steps: 0 is the gradient on the prompt as it is. Else integrated gradients (Sundararajan et al. 2017,
                arXiv:1703.01365), layer by layer: the mean gradient while one layer's z grows from 0 to what it is,
                at the middle of as many steps, with what comes after running on; z . g is then the difference that
                zeroing the layer makes, up to the steps; not where a norm follows the attention (Gemma 2), after
                which a layer's output is the same however small z is.
        """
        names = [self._lm.layer(layer).hook_name for layer in range(self.n_layers)]
        frozen, dtype = self.nodes.frozen, self._lm.weights_dtype
        if not names:
            return []
        if not steps:
            _, found = self._lm.gradients(frozen.tokens[None], names, (self.hook, self.of))
            return [each[0].to(frozen.dtype) for each in found]
        shares = (torch.arange(steps, device=frozen.final.device, dtype=frozen.dtype) + 0.5) / steps
        mean = []
        for layer, name in enumerate(names):
            resid = frozen.entering(layer)[None].expand(steps, -1, -1).to(dtype)
            z = frozen.layers[layer].z * shares[:, None, None, None]
            z[:, 0] = frozen.layers[layer].z[0]  # BOS is left alone
            edits = self._lm.layer(layer).replacing(z)
            _, of_steps = self._lm.gradients(resid, [name], (self.hook, self.of), layer, edits)
            mean.append(of_steps[0].to(frozen.dtype).mean(0))
        return mean

    def attribution(self, steps: int = 0) -> pd.DataFrame:
        """What every feature, error and bias adds, at first order: node . gradient; columns of `Parts`.

        f (W_dec . g) of a feature; of a layer, head and position they sum to z . g.
        """
        gradient = self.gradient(steps)
        require(bool(gradient), "nothing comes before layer 0")
        found = self.nodes.of_z(gradient).table()
        return found.drop(columns="row").rename(columns={"value": "attribution"})

    @torch.no_grad()
    def removed(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows of `attribution` with what taking each node away takes from the number, and what of it is direct.

        `effect`: the number as it is, less that of a run without the node, with all that comes after running on.
        `direct`: with everything after frozen but the target's own readout: the final norm and unembedding, or nothing
        for a feature, which reads through attention and no other way. BOS is left alone.
        """
        frozen, dtype, whole = self.nodes.frozen, self._lm.weights_dtype, self.value()
        effect, direct = torch.full((2, len(table)), torch.nan, dtype=frozen.dtype)
        layers, positions = (torch.tensor(table[name].to_numpy(dtype=int)) for name in ("layer", "position"))
        rows: Any = table.itertuples()
        parts = [self.nodes.written(row.kind, row.layer, row.head, row.feature, row.position) for row in rows]
        for layer in sorted(set(layers.tolist())):
            heads = frozen.layers[layer]
            of_layer = (layers == layer).nonzero()[:, 0]
            for some in of_layer.split(max(1, _BATCH_TOKENS // len(frozen.tokens))):
                part, at, row = torch.stack([parts[i] for i in some.tolist()]), positions[some], torch.arange(len(some))
                first = min(int(at.min()), self.target.position)  # nothing is different before
                z = heads.z[first:].expand(len(some), -1, -1, -1).clone()
                z[row, at - first] -= part
                effect[some] = whole - self._with(layer, z, first)
                if self.target.layer is None:
                    final = frozen.final.expand(len(some), *frozen.final.shape).clone()
                    written = torch.einsum("nhd,hdm->nm", part, frozen.W_O(layer))
                    final[row, at] -= written / heads.write_scale[at][:, None]
                    direct[some] = whole - self.of(final.to(dtype)).cpu()
        return table.assign(effect=effect.numpy(), direct=direct.numpy())

    @torch.no_grad()
    def heads(self, steps: int = 0) -> pd.DataFrame:
        """Of every whole head: layer, head, attribution (z . g), effect (what is lost with z 0); BOS left alone."""
        frozen, whole, rows = self.nodes.frozen, self.value(), []
        for layer, g in enumerate(self.gradient(steps)):
            z = frozen.layers[layer].z
            attribution = (z * g)[1:].sum((0, 2))
            without = z.expand(len(attribution), *z.shape).clone()
            for head in range(len(attribution)):
                without[head, 1:, head] = 0
            effect = whole - self._with(layer, without)
            columns = zip(attribution.tolist(), effect.tolist(), strict=True)
            rows += [(layer, head, *figures) for head, figures in enumerate(columns)]
        return pd.DataFrame(rows, columns=["layer", "head", "attribution", "effect"])

    def _with(self, layer: int, z: Float[Tensor, "run pos head d_head"], first: int = 0) -> Float[Tensor, " run"]:
        """The number, run on from a layer with each of some z in place of its own from a position on."""
        frozen = self.nodes.frozen
        inputs = frozen.entering(layer)[first:].to(self._lm.weights_dtype).expand(len(z), -1, -1)
        past = frozen.before(first, len(z)) if first else None
        got = self._lm.capture(inputs, [self.hook], layer, self._lm.layer(layer).replacing(z), past)
        return self.of(got[self.hook], first).cpu()
