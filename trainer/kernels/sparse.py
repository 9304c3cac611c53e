"""Selection of active features, and gradients that touch nothing else: as a CPU does it.

With L0 active features of thousands, decoding and all gradients are sums over (token, feature) pairs:
weighted embedding bags over the rows of W_dec, of the error and of the input. Only the encoder is a
dense matmul. The results equal dense gradients to float rounding.

A bag is (block, token): `block * batch + token`; a feature is `block * features_per_block + index`.
"""

import warnings
from collections.abc import Callable
from itertools import product
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from trainer import ranks
from trainer.kernels import workers
from trainer.kernels.dense import Outcome, Params, empty_outcome, into_b_dec
from trainer.kernels.order import nth_largest

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")  # one operator is used, and tested

_TILE = 2**20  # activations computed at a time on a CPU

Result = TypeVar("Result")


class Active(NamedTuple):
    """Active features of a batch, sorted by bag."""

    bag: Int[Tensor, " pair"]
    feature: Int[Tensor, " pair"]
    value: Float[Tensor, " pair"]

    def where(self, keep: Tensor) -> "Active":
        """The pairs for which `keep` is true."""
        return Active(*(each[keep] for each in self))


def gradients(
    params: Params,
    x: Float[Tensor, "head batch width"],
    active: Active,
    slope: Float[Tensor, "block feature"] | None = None,
    centred: bool = False,
) -> Outcome:
    """|x - x_hat|^2 + sum_i slope_i f_i, mean over the batch, for given active features.

    Args:
        slope: derivative of the penalty by the activations (with its coefficient).
        centred: b_dec is subtracted from the input of the encoder.
    """
    W_dec, b_dec = params["W_dec"], params["b_dec"]
    n_blocks, n_features, _ = W_dec.shape
    n_heads, batch, _ = x.shape
    out = empty_outcome(params, x)
    edges = torch.searchsorted(active.bag, torch.arange(n_blocks + 1) * batch).tolist()

    def of_block(block: int) -> None:
        bag, feature, value = (each[edges[block] : edges[block + 1]] for each in active)
        bag, feature = bag - block * batch, feature - block * n_features
        rows, target = W_dec[block], x[block % n_heads]  # [feature, width], [token, width]
        inputs = target - b_dec[block] if centred else target
        bounds = _bounds(bag, batch)
        x_hat = embedding_bag(feature, rows, bounds[:-1], mode="sum", per_sample_weights=value)
        error = torch.sub(x_hat + b_dec[block], target, out=out.error[block])
        g = error * (2 / batch)
        pairs = torch.sparse_csr_tensor(bounds, feature, value, (batch, n_features), check_invariants=False)
        df = torch.sparse.sampled_addmm(pairs, g, rows.T, beta=0.0).values()  # g[bag] . W_dec[feature]
        if slope is not None:
            df = df + slope[block][feature]

        order = feature.argsort(stable=True)
        bag = bag[order]
        bounds = _bounds(feature[order], n_features)
        d_columns = embedding_bag(bag, inputs, bounds[:-1], mode="sum", per_sample_weights=df[order])
        out.grads["W_enc"][block] = d_columns.T
        out.grads["b_enc"][block].index_add_(0, feature, df)
        out.grads["W_dec"][block] = embedding_bag(bag, g, bounds[:-1], mode="sum", per_sample_weights=value[order])
        out.fired[block] = bounds.diff()

    workers.each(of_block, range(n_blocks))
    into_b_dec(out, params, centred)
    return out


def above(params: Params, x: Float[Tensor, "head batch width"], threshold: Float[Tensor, " block"]) -> Active:
    """Features whose pre-activation exceeds their block's threshold."""
    n_features = params["b_enc"].shape[1]

    def find(block: int, start: int, pre: Float[Tensor, "block token feature"]) -> Active:
        at = _true(pre > threshold[block : block + len(pre), None, None])  # in the tile, flat
        row = at // n_features  # (block, token) in the tile, which has one block, or all tokens of several
        bag = row + (block * x.shape[1] + start)
        feature = at + (bag // x.shape[1] - row) * n_features  # at - row * n_features + block * n_features
        return Active(bag, feature, pre.view(-1)[at])

    tiles = _of_pre_activations(find, params, x)
    return Active(*map(torch.cat, zip(*tiles, strict=True)))


def top_k(params: Params, x: Float[Tensor, "head batch width"], k: Int[Tensor, " point"], layer: bool) -> Active:
    """The k largest pre-activations of each token, of each head or over the heads of a point, where positive.

    Gao et al. 2024 (arXiv:2406.04093).
    """
    n_heads, batch, _ = x.shape
    n_blocks, n_features = params["b_enc"].shape
    largest = int(k.max())

    def find(block: int, start: int, pre: Float[Tensor, "block token feature"]) -> tuple[Tensor, Tensor]:
        if layer:  # a row is a token of a point, with the features of all its heads: [point, token, head * feature]
            pre = pre.view(-1, n_heads, *pre.shape[1:]).transpose(1, 2).flatten(2)
        return top_of_rows(pre, largest)

    values, indices = zip(*_of_pre_activations(find, params, x, whole=layer), strict=True)
    n_rows = len(k) if layer else n_blocks
    # A tile is some tokens of all points, or of one block: [point or block, token, largest].
    join = (lambda tiles: torch.cat(tiles, 1)) if layer else (lambda tiles: torch.cat([t.flatten(0, 1) for t in tiles]))
    value, index = (join(tiles).view(n_rows, batch, largest) for tiles in (values, indices))
    first = torch.arange(0, n_blocks, n_blocks // n_rows, device=x.device)  # block of each row
    feature = index.add_(first[:, None, None] * n_features)
    block = feature // n_features if layer else first[:, None, None]
    bag = (block * batch + torch.arange(batch, device=x.device)[:, None]).expand_as(feature)
    active = Active(bag.flatten(), feature.flatten(), value.flatten())
    rank = torch.arange(largest, device=x.device)
    keep = (value > 0) & (rank < k.repeat_interleave(n_rows // len(k))[:, None, None])
    if not keep.all():
        active = active.where(keep.flatten())
    return active.where(active.bag.argsort(stable=True)) if layer else active


def batch_top_k(
    params: Params,
    x: Float[Tensor, "head batch width"],
    counts: Int[Tensor, " group"],
    guess: Float[Tensor, " group"],
) -> tuple[Active, Float[Tensor, " group"]]:
    """The `counts[g]` largest pre-activations of the batch in every group of blocks, where positive.

    The batch is that of all processes; active features are of this one's share of it.

    Bussmann et al. 2024 (arXiv:2412.06410). Sorting every activation would cost more than all matmuls:
    only those above a guess (a little below the last batch's threshold) are looked at, and the guess is
    lowered where it leaves too few; so the result does not depend on it.

    Args:
        counts: features to keep, k times the whole batch; groups are the blocks, or the points.
        guess: a threshold for every group, the same in all processes.

    Returns:
        The active features, and the smallest activation kept in each group (0 where none is).
    """
    n_blocks, batch = len(params["b_enc"]), x.shape[1]
    per_group = n_blocks // len(counts)
    while True:
        candidates = above(params, x, guess.clamp_min(0).repeat_interleave(per_group))
        edges = torch.arange(len(counts) + 1, device=x.device) * per_group * batch
        edges = torch.searchsorted(candidates.bag, edges)
        short = (ranks.total(edges.diff()) < counts) & (guess > 0)
        if not short.any():
            break
        guess = torch.where(short, torch.where(guess > 1e-3, guess * 0.7, 0.0), guess)
    groups = candidates.value.split(edges.diff().tolist())
    thresholds = nth_largest(groups, counts.tolist())
    keep = [values >= threshold for values, threshold in zip(groups, thresholds, strict=True)]
    return candidates.where(torch.cat(keep)), thresholds


def first_guess(params: Params, x: Float[Tensor, "head batch width"], counts: Int[Tensor, " group"]) -> Tensor:
    """A threshold for `batch_top_k` from a few tokens."""
    sample = x[:, :64]
    (pre,) = _of_pre_activations(lambda block, start, pre: pre, params, sample, whole=True)
    share = counts * (sample.shape[1] / x.shape[1] / ranks.size())
    rows = pre.reshape(len(counts), -1)
    return torch.stack([row.topk(max(1, int(n))).values[-1] for row, n in zip(rows, share.tolist(), strict=True)]) * 0.8


def _of_pre_activations(
    use: Callable[[int, int, Float[Tensor, "block token feature"]], Result],
    params: Params,
    x: Float[Tensor, "head batch width"],
    whole: bool = False,
) -> list[Result]:
    """What is made of x W_enc + b_enc in tiles: of the first block, the first token, and `[block, token, feature]`.

    A tile fits in the cache: one block, or with `whole` few tokens of all blocks.
    """
    W_enc, b_enc = params["W_enc"], params["b_enc"]
    n_blocks, _, n_features = W_enc.shape
    n_heads, batch, _ = x.shape
    chunk = n_blocks if whole else 1
    step = max(64, _TILE // (chunk * n_features))

    def of_tile(place: tuple[int, int]) -> Result:
        block, start = place
        blocks, rows = slice(block, block + chunk), slice(start, start + step)
        tile = x[block % n_heads, None, rows] if chunk == 1 else x[:, rows].repeat(n_blocks // n_heads, 1, 1)
        return use(block, start, torch.baddbmm(b_enc[blocks, None], tile, W_enc[blocks]))

    return workers.each(of_tile, product(range(0, n_blocks, chunk), range(0, batch, step)))


def top_of_rows(x: Float[Tensor, "*rows n"], k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k)`, exactly, for less than its cost on a CPU.

    The k largest lie in the k groups with the largest maxima, so only those groups are searched.
    """
    n = x.shape[-1]
    sizes = [s for s in (4, 8, 16, 32) if n % s == 0 and n // s >= k]
    searched = [n // s + k * s for s in sizes]
    if not sizes or min(searched) > n // 2:
        return x.topk(k, dim=-1)
    size = sizes[searched.index(min(searched))]
    grouped = x.view(*x.shape[:-1], size, n // size)  # a group is every (n / size)-th value
    _, best = top_of_rows(grouped.amax(-2), k)
    members = grouped.gather(-1, best[..., None, :].expand(*best.shape[:-1], size, k)).flatten(-2)
    value, at = members.topk(k, dim=-1)
    return value, at // k * (n // size) + best.gather(-1, at % k)


def _true(mask: Tensor) -> Int[Tensor, " hit"]:
    """Flat positions of the true values; words of 8 are looked at first, since most hold none."""
    words = mask.view(-1)
    if mask.numel() % 8:
        return words.nonzero()[:, 0]
    words = words.view(torch.int64)
    hit = words.nonzero()[:, 0]
    bit = words[hit].view(torch.bool).view(-1, 8).nonzero()
    return hit[bit[:, 0]] * 8 + bit[:, 1]


def _bounds(sorted_ids: Int[Tensor, " pair"], n: int) -> Int[Tensor, " n_plus_1"]:
    """Where each of n ids begins in a sorted list."""
    return torch.cat([sorted_ids.new_zeros(1), torch.bincount(sorted_ids, minlength=n).cumsum(0)])
