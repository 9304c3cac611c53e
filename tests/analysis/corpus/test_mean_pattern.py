"""Mean attention patterns against TransformerLens' own hook_pattern, and as the store reads them."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import schema
from analysis.attribution import Reader
from analysis.corpus.mean_pattern import MeanPattern
from analysis.corpus.passes import feed, sources_on_repeats
from analysis.store import Analysis
from tests.analysis.test_attribution import previous_token_and_induction_model
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint, CheckpointError
from trainer.evaluate import repeated_tokens


def hooked(lm, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """Attention [context, head, query, source], by a whole forward."""
    _, cache = lm.model.run_with_cache(tokens)
    return cache[f"blocks.{layer}.attn.hook_pattern"].double()


def pooled(pattern: np.ndarray, step: int) -> np.ndarray:
    """Cell by cell: of the destinations in a row the mean, of the sources in a column the sum."""
    n = len(pattern)
    cells = [range(1)] + [range(first, min(first + step, n)) for first in range(1, n, step)]
    return np.array([[pattern[np.ix_(q, s)].sum(1).mean() for s in cells] for q in cells])


def shares(picture) -> np.ndarray:
    """Attention that the bytes of a picture stand for [cell, cell]."""
    return (np.frombuffer(picture.values, np.int8).reshape(picture.size, -1) / 127) ** 2


def check(picture, expected: np.ndarray) -> None:
    """Equal to half a step of the root."""
    assert np.abs(np.sqrt(shares(picture)) - np.sqrt(expected)).max() < 0.51 / 127


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("positions", [1, 2, 20, 50, 64])
def test_the_mean_is_that_of_hook_pattern(model, positions, request):
    """Also of grouped queries, over several chunks of unequal size, and of contexts that are cut."""
    lm = request.getfixturevalue(model)
    contexts = torch.randint(1, 257, (45, 64), generator=torch.Generator().manual_seed(0))
    contexts[:, 0] = 0
    mean = MeanPattern(lm.n_heads, positions)
    list(feed(lm, contexts, torch.arange(45), {1: [mean]}))
    expected = hooked(lm, 1, contexts)[:, :, :positions, :positions].mean(0)
    torch.testing.assert_close(mean.mean(), expected, atol=1e-6, rtol=0)
    assert mean.described() == {"contexts": 45, "cells": positions, "step": 1}


@pytest.mark.parametrize("length", [31, 128, 211])
def test_longer_contexts_are_pooled(gpt2, length):
    half = (length - 1) // 2
    sae = BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 2).requires_grad_(False)
    layer = gpt2.layer(1)
    _, seen = sources_on_repeats(layer.lm, {layer.index: [Reader(sae, layer)]}, 9, length, seed=3)[layer.index]
    expected = hooked(gpt2, 1, repeated_tokens(gpt2, 9, half, 3)).mean(0).numpy()
    step = math.ceil(2 * half / 63)
    assert seen.described()["step"] == step and seen.described()["cells"] <= schema.PATTERN_CELLS
    assert np.allclose(seen.mean().sum(-1), 1, atol=1e-5), "rows sum to 1"
    for head in range(gpt2.n_heads):
        assert np.allclose(seen.mean()[head], pooled(expected[head], step), atol=1e-6)


@pytest.mark.parametrize("length", [21, 129])
def test_the_stripe_of_an_induction_head_is_in_it(length):
    """Half a context and a token back, from the second half on; the head beside it attends everywhere alike."""
    lm = previous_token_and_induction_model(200, length)
    sae = BlockDiagSAE(2, lm.d_head, 2).requires_grad_(False)
    _, seen = sources_on_repeats(lm, {1: [Reader(sae, lm.layer(1))]}, 8, length, seed=0)[1]
    half, step = (length - 1) // 2, seen.described()["step"]
    stripe = [seen.mean()[head].diagonal(-(half - 1) // step)[-half // step :] for head in range(2)]
    assert stripe[0].mean() > 0.4 > 0.1 > stripe[1].mean()


def test_the_analysis_keeps_both(analysed):
    for name in ("block-l1_1", "dense"):
        checkpoint = Checkpoint(analysed / name)
        lm, analysis = checkpoint.open_model(), Analysis(checkpoint)
        contexts = checkpoint.open_text(lm.tokenizer).held_out(analysis.meta["n_tokens"] // 31)
        assert analysis.meta["patterns"]["text"] == {"contexts": len(contexts), "cells": 32, "step": 1}
        expected = {"text": contexts, "repeated": repeated_tokens(lm, 4096 // 31, 15, 0)}
        for on, tokens in expected.items():
            of_heads = hooked(lm, 1, tokens).mean(0).numpy()
            assert analysis.meta["patterns"][on]["contexts"] == len(tokens)
            for picture, of_head in zip(analysis.patterns[on], of_heads, strict=True):
                check(picture, of_head)


def test_an_older_analysis_has_none(analysed, tmp_path):
    path = shutil.copytree(analysed / "dense", tmp_path / "a")
    file = path / "analysis" / "meta.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in meta.items() if key != "patterns"}))
    (path / "analysis" / "patterns.parquet").unlink()
    assert Analysis(Checkpoint(path)).patterns == {}
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"patterns.parquet is missing: run"):
        _ = Analysis(Checkpoint(path)).patterns


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("head", 0, "not in their order"),
        ("text", b"", "column text has what is no pattern"),
        ("repeated", b"\1" * 4096, "column repeated has what is no pattern"),
        ("text", b"\xff" * 1024, "column text has what is no pattern"),
        ("repeated", "x" * 961, "column repeated is .*string, not bytes"),
        ("text", None, "column text has empty cells"),
    ],
)
def test_what_is_no_pattern_is_one_sentence(analysed, tmp_path, column, value, message):
    path = shutil.copytree(analysed / "dense", tmp_path / "a")
    file = path / "analysis" / "patterns.parquet"
    table = pd.read_parquet(file)
    table[column] = [value] * len(table)
    table.to_parquet(file)
    with pytest.raises(CheckpointError, match=f"patterns.parquet is damaged .*{message}"):
        _ = Analysis(Checkpoint(path)).patterns


@pytest.mark.parametrize("changes", [{"cells": 65}, {"cells": 0}, {"contexts": 0}, {"step": "2"}, {"cells": 2**70}])
def test_sizes_that_cannot_be_are_one_sentence(analysed, tmp_path, changes):
    path = shutil.copytree(analysed / "dense", tmp_path / "a")
    file = path / "analysis" / "meta.json"
    meta = json.loads(file.read_text())
    meta["patterns"]["text"] |= changes
    file.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"meta.json is damaged"):
        Analysis(Checkpoint(path))
