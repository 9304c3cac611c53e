"""The dashboard of the reference as one HTML file that works offline, drawn by sae-vis 0.3.7.

    python -m analysis.sae_vis checkpoints/<name> OUT.html [--features_per_head 10] [--tokens 20000]

sae-vis picks the examples and draws the page. What it does badly is done here: the language model runs once for all
features; activations are those of our SAE at every position but BOS; sources are our exact DFA (its own takes
another feature's encoder); loss effects go through the model's own final norm and unembedding (its own divides by
the variance); features that do not fire and examples without activation are left out; its scripts come from
installed packages and not from a CDN. Its view of a prompt, whose labels are off by one, is not offered.
"""

import argparse
import html
import re
import sys
import warnings
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_vis import data_fetching_fns
from sae_vis.data_config_classes import SaeVisConfig, SaeVisLayoutConfig, SeqMultiGroupConfig
from sae_vis.data_storing_fns import SaeVisData, SeqMultiGroupData
from sae_vis.utils_fns import RollingCorrCoef
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from analysis.attribution import Reader
from analysis.logits import mean_inverse
from analysis.tokens import visible
from trainer import cli
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint
from trainer.config import require
from trainer.files import make_writable, write_atomically
from trainer.model.lm import LanguageModel, Layer, pick_device
from trainer.sharing.pull import located

_BATCH_TOKENS = 2048  # of one forward pass
_SCRIPTS = (("mpld3", "mpld3/js/d3.v5.min.js"), ("plotly", "plotly/package_data/plotly.min.js"))
# The page is written for d3 6, which gives listeners the event; d3 5 gives them the datum. And it puts tokens into
# HTML as they are, where <s> would be a tag.
_ADAPTER = """d3.selection.prototype.on = function (type, listener) {
    return this.each(function () { this.addEventListener(type, event => listener.call(this, event)); });
};
function escaped(token) {
    return token.replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/ /g, '&nbsp;');
}"""
_ESCAPED = {
    "<code>${tok.replace(/ /g, '&nbsp;')}</code>": "<code>${escaped(tok)}</code>",
    "<code>${tok}</code>": "<code>${escaped(tok)}</code>",
    "`|${tok}|": "`|${escaped(tok)}|",
}
_STYLE = """<style>
.dfa-seq-group { min-width: max-content; margin-right: 15px; padding-top: 5px; }
.note { font-family: system-ui; margin: 30px 10px 0; max-width: 1200px; }
</style>"""  # long sources would run into the examples on their right


class Harvest(NamedTuple):
    """What one pass of the language model leaves for the first features of every block; position 0 is BOS.

    `resid` is the residual stream before the final norm, `scale` the layer's `output_scale`; `reads` is
    (v[s] - b_V) . w of the given features of a block, as each head is read; `correlations` are with all features of
    the SAE.
    """

    tokens: Int[Tensor, "context pos"]
    features: Int[Tensor, " feature"]
    f: Float[Tensor, "context pos feature"]
    resid: Float[Tensor, "context pos d_model"]
    scale: Float[Tensor, "context pos 1"]
    pattern: Float[Tensor, "context head query source"]
    heads: Int[Tensor, "feature read"]  # those that a feature reads: its own, or all of them
    reads: Float[Tensor, "context feature read source"]
    correlations: RollingCorrCoef


@torch.no_grad()
def harvest(
    layer: Layer,
    sae: BlockDiagSAE,
    tokens: Int[Tensor, "context pos"],
    features: Int[Tensor, " feature"],
) -> Harvest:
    """Run the language model once over the contexts.

    Args:
        sae: for raw hook_z of `layer`.
        tokens: contexts beginning with BOS.
        features: global ids, ascending.

    Raises:
        ValueError: the model has other sizes.
    """
    n_heads, d_in = layer.n_heads, layer.n_heads * layer.d_head
    require(sae.d_in == d_in, f"the SAE reads {sae.d_in} dimensions, which {layer.lm.name} does not have")
    reader = Reader(sae, layer)
    block, index = features // sae.features_per_block, features % sae.features_per_block
    heads = torch.arange(n_heads).expand(len(features), -1) if sae.is_dense else block[:, None]
    w = reader.W_enc.mT[heads, index[:, None]]  # [feature, read, d_head]
    correlations = RollingCorrCoef(indices=features.tolist(), with_self=True)
    parts = []
    for batch in tqdm(tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1])), "Language model", dynamic_ncols=True):
        attention, resid_pre, final = layer.forward(batch)
        z, v, pattern, resid, scale = (part.float() for part in (*attention, final, layer.output_scale(resid_pre)))
        f = sae.encode(z).flatten(-2).cpu()
        correlations.update(f[:, 1:, features], f[:, 1:])  # BOS is not part of what the SAE is for
        parts.append(
            (
                f[..., features],
                resid.cpu(),
                scale.cpu(),
                pattern.cpu(),
                torch.einsum("csfrd,frd->cfrs", (v - reader.b_V)[:, :, heads], w).cpu(),
            )
        )
    f, resid, scale, pattern, reads = map(torch.cat, zip(*parts, strict=True))
    return Harvest(tokens.cpu(), features, f, resid, scale, pattern, heads, reads, correlations)


@torch.no_grad()
def vis_data(layer: Layer, sae: BlockDiagSAE, harvested: Harvest) -> SaeVisData:
    """sae-vis's data of the features that fire, with our DFA as the sources of every example.

    An example is a token on which a feature fires with the 5 tokens before and after it, never BOS; its sources
    are the 11 tokens around the one with the largest DFA. Positions count from BOS, which is 0.

    Raises:
        ValueError: no feature fires, or there are too few tokens to choose examples from.
    """
    lm, layout = layer.lm, SaeVisLayoutConfig.default_feature_centric_layout()
    layout.seq_cfg.dfa_for_attn_saes = False
    before, after = layout.seq_cfg.buffer
    # sae-vis is not shown BOS and wants one more token before an example. Of one context it takes examples that lie
    # more than before + 1 positions apart, and it crashes when they run out.
    choices = harvested.tokens.shape[1] - 1 - (before + 1) - after
    distinct = len(harvested.tokens) * -(-choices // (2 * before + 3))
    require(
        choices > 0 and distinct >= layout.seq_cfg.top_acts_group_size,
        f"{len(harvested.tokens)} contexts of {harvested.tokens.shape[1]} tokens are too few to choose examples from: "
        "raise --tokens (and contexts must have at least 13)",
    )
    alive = (harvested.f[:, before + 2 : -after] > 0).flatten(0, 1).any(0)
    require(bool(alive.any()), "none of these features fires on these tokens: raise --tokens or --features_per_head")
    features, f, correlations = harvested.features[alive], harvested.f[..., alive], copy(harvested.correlations)
    correlations.indices = features.tolist()
    for name in ("x_sum", "x2_sum", "xy_sum"):
        setattr(correlations, name, getattr(correlations, name)[alive])

    block, index = features // sae.features_per_block, features % sae.features_per_block
    W_dec = torch.zeros(len(features), sae.n_blocks, sae.width)
    W_dec[torch.arange(len(features)), block] = sae.W_dec.cpu()[block, index]
    W_dec = W_dec.flatten(1)
    # One column more in what sae-vis takes for the residual stream: by it the loss effects divide (`_own_unembedding`).
    to_resid = pad(W_dec.to(lm.device) @ layer.W_O.flatten(0, 1).float(), (0, 1))
    resid = torch.cat([harvested.resid * harvested.scale, harvested.scale], -1)
    hook_name, last = layer.hook_name, f"blocks.{lm.n_layers - 1}.hook_resid_post"
    texts = lm.token_strings(list(range(lm.d_vocab)))
    strings = dict(enumerate(text if text.isprintable() else visible(text) for text in texts))
    with _own_unembedding(lm), tqdm(desc="Features", total=len(features), unit="feature", dynamic_ncols=True) as bar:
        data, _ = data_fetching_fns.parse_feature_data(
            model=SimpleNamespace(cfg=lm.model.cfg, W_U=pad(lm.model.W_U.float(), (0, 0, 0, 1))),
            cfg=SaeVisConfig(feature_centric_layout=layout),
            sae=SimpleNamespace(cfg=SimpleNamespace(hook_name=hook_name, hook_layer=layer.index)),
            sae_B=None,
            tokens=harvested.tokens[:, 1:],
            feature_indices=features.tolist(),
            feature_resid_dir=to_resid,
            feature_resid_dir_input=to_resid,  # for probes, which there are none of
            feature_out_dir=W_dec,
            cache={f"{hook_name}.hook_sae_acts_post": f[:, 1:], last: resid[:, 1:]},
            corrcoef_sae=correlations,
            vocab_dict=dict.fromkeys(("embed", "unembed", "probes"), strings),
            progress=[None, bar],
        )
    for row, parts in zip(alive.nonzero()[:, 0].tolist(), data.feature_data_dict.values(), strict=True):
        for histogram in ("actsHistogram", "logitsHistogram"):  # 100,000 ticks where values are small, nearly all 0
            parts[histogram].tick_vals = list(dict.fromkeys(parts[histogram].tick_vals))
        _fill_sources(parts["seqMultiGroup"], layout.seq_cfg, harvested, row)
    return data


def _fill_sources(groups: SeqMultiGroupData, cfg: SeqMultiGroupConfig, harvested: Harvest, row: int) -> None:
    """Set the sources of every example of a feature, `row` of those harvested, and drop those without activation."""
    for group in groups.seq_group_data:
        examples, group.seq_data = group.seq_data, []
        for example in examples:
            positions = [literal_eval(position) for position in example.token_posns]
            context, q = positions[cfg.buffer[0]][0], positions[cfg.buffer[0]][1] + 1
            if harvested.f[context, q, row] <= 0:
                continue
            values = (harvested.pattern[context, harvested.heads[row], q] * harvested.reads[context, row]).sum(0)
            width = len(example.token_ids)  # sae-vis wants as many sources
            begin = min(max(int(values.argmax()) - cfg.dfa_buffer[0], 0), len(values) - width)
            example.dfa_token_ids = harvested.tokens[context, begin : begin + width].tolist()
            example.dfa_values = [round(value, 4) for value in values[begin : begin + width].tolist()]
            example.dfa_token_posns = [f"({context}, {s})" for s in range(begin, begin + width)]
            example.token_posns = [f"({context}, {s + 1})" for _, s in positions]
            group.seq_data.append(example)
    # To sae-vis the largest activation of an empty interval is 1, which would fade the colours of the others.
    groups.seq_group_data = [group for group in groups.seq_group_data if group.seq_data]
    top = groups.seq_group_data[0]
    top.title = top.title.replace("TOP ACTIVATIONS", "TOP ACTIVATIONS (right) & DFA (left)")


@contextmanager
def _own_unembedding(lm: LanguageModel) -> Iterator[None]:
    """Let sae-vis compute where the model is, turn residual streams into logits as it does, and draw repeatably."""

    def to_logits(scaled: Float[Tensor, "example pos column"], model: Any) -> Float[Tensor, "example pos d_vocab"]:
        return lm.logits((scaled[..., :-1] / scaled[..., -1:]).to(lm.model.W_U.dtype)).float()

    patches = {"resid_final_pre_layernorm_to_logits": to_logits, "device": lm.device}
    originals = {name: getattr(data_fetching_fns, name) for name in patches}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="eindex")
        torch.manual_seed(0)
        try:
            vars(data_fetching_fns).update(patches)
            yield
        finally:
            vars(data_fetching_fns).update(originals)


def save(path: Path, data: SaeVisData, title: str, note: str) -> None:
    """Write the page, in one step: one file that asks no other machine for anything.

    Args:
        title: of the browser's window.
        note: plain text below the selector.

    Raises:
        ValueError: a package that carries a script is missing, or sae-vis writes another page than 0.3.7.
    """
    d3, plotly = _scripts()

    def write(partial: Path) -> None:
        data.save_feature_centric_vis(str(partial))
        page, values = partial.read_text().split("function defineData()", 1)
        values, end = values.rsplit("</script>", 1)
        values = values.replace("<", "\\u003c")  # a token must not end the script
        for text, escaped in _ESCAPED.items():
            require(text in page, "sae-vis writes another page than 0.3.7, whose faults are known")
            page = page.replace(text, escaped)
        inline = iter((f"{d3}\n{_ADAPTER}", plotly))
        page, n = re.subn(r'<script src="[^"]*"></script>', lambda _: f"<script>\n{next(inline)}\n</script>", page)
        require(n == len(_SCRIPTS), f"sae-vis asks for {n} scripts, 0.3.7 for {len(_SCRIPTS)}")
        grid = "<div class='grid-container'>"
        page = page.replace(grid, f"<p class='note'>{html.escape(note)}</p>\n{grid}", 1)
        head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n{_STYLE}\n'
        partial.write_text(f"{head}{page}function defineData(){values}</script>{end}", encoding="utf-8")

    write_atomically(path, write)


def _scripts() -> list[str]:
    """d3 and plotly, from the packages that carry them."""
    scripts = []
    for package, file in _SCRIPTS:
        try:
            scripts.append(Path(str(distribution(package).locate_file(file))).read_text(encoding="utf-8"))
        except (PackageNotFoundError, OSError):
            raise ValueError(f"{package} with {file} is not installed: pip install -r requirements.txt") from None
    return scripts


def first_features(sae: BlockDiagSAE, n: int) -> Int[Tensor, " feature"]:
    """The first n features of each block (of all features, where the SAE is dense).

    Raises:
        ValueError: a block has fewer.
    """
    require(1 <= n <= sae.features_per_block, f"features_per_head must lie between 1 and {sae.features_per_block}")
    return (torch.arange(sae.n_blocks)[:, None] * sae.features_per_block + torch.arange(n)).flatten()


def export(
    path: Path,
    out: Path,
    features_per_head: int = 10,
    tokens: int = 20_000,
    features: list[int] | None = None,
    lm: LanguageModel | None = None,
    model: str | None = None,
    text: str | None = None,
) -> None:
    """Write the dashboard of a checkpoint, on the held-out documents of the text it was trained on.

    Args:
        path: the checkpoint directory.
        features_per_head: the first so many of each head (of all features, where the SAE is dense).
        tokens: held-out tokens, in whole contexts.
        features: these instead, by global id.
        lm: the model of the checkpoint, where it is loaded already.
        model, text: where they lie now, if elsewhere than in training.

    Raises:
        ValueError: the checkpoint, its model or text, or a number cannot be used.
    """
    require(tokens >= 1, f"tokens must be at least 1, got {tokens}")
    require(not out.is_dir(), f"{out} is a folder: name the file to write")
    require(out.parent.is_dir(), f"the folder {out.parent} does not exist")
    make_writable(out.parent)
    _scripts()  # refuse before minutes of work
    checkpoint = Checkpoint(path)
    sae = checkpoint.sae
    lm = lm or checkpoint.open_model(pick_device("auto"), model)
    layer = lm.layer(checkpoint.layer)
    corpus = checkpoint.open_text(lm.tokenizer, text)
    contexts = corpus.held_out_tokens(tokens)
    chosen = first_features(sae, features_per_head) if features is None else torch.tensor(sorted(features))
    harvested = harvest(layer, sae, contexts, chosen)
    data = vis_data(layer, sae, harvested)
    total = len(harvested.features)
    silent = f"{total - len(data.feature_data_dict)} of {total} do not fire there"
    seen = f"{contexts[:, 1:].numel():,} held-out tokens; {silent}"
    of = f"each of {lm.n_heads} heads (feature id = head * {sae.features_per_block} + index)"
    of = "the dense SAE" if sae.is_dense else of
    which = f"the first {features_per_head}" if features is None else "chosen"
    inverse = mean_inverse(lm, harvested.resid.to(lm.device), harvested.scale)
    note = (
        f"{path.name}: layer {layer.index} of {lm.name}, {which} features of {of} on {seen} and are left out. Orange: "
        "activation. Underlined: direct effect on the loss of this token; blue lowers it, red raises it. Green: exact "
        "direct feature attribution, the sources that the bold token's activation reads from. Positions are (context, "
        "position). Logits: before the norms divide; the app has them times the mean of one over what the norms divide "
        f"by, here {inverse:.3g}."
    )
    save(out, data, path.name, note)
    print(f"{out}: {len(data.feature_data_dict)} features on {seen}")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.sae_vis",
        description="Write the first features of each head as one HTML file that works offline, drawn by sae-vis.",
        epilog="Cost: one forward pass over the tokens, then 2 s of one core for every feature that fires; with the "
        "embedded model 18 features on 4,000 tokens take a minute and 2.7 GB. Attention patterns are kept: 4 bytes * "
        "tokens * heads * context.",
    )
    parser.add_argument("checkpoint", help=cli.CHECKPOINT)
    parser.add_argument("out", type=Path, metavar="OUT.html", help="file to write")
    parser.add_argument("--features_per_head", type=int, default=10, help="the first so many of each head; default 10")
    parser.add_argument("--tokens", type=int, default=20_000, help="held-out tokens to choose examples from")
    cli.add_places(parser)
    options = parser.parse_args(argv)
    places = {"model": options.model, "text": options.text}
    return cli.status(
        lambda: export(located(options.checkpoint), options.out, options.features_per_head, options.tokens, **places)
    )


if __name__ == "__main__":
    sys.exit(main())
