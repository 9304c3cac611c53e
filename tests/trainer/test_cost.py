"""What a run is said to take is what it takes, and what does not fit is refused before anything is harvested."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import tiny_run
from trainer import cost
from trainer.__main__ import main
from trainer.config import ActivationsConfig, SAEOptions, TrainingConfig
from trainer.cost import Cost, expected
from trainer.data.buffer import batches, buffer_rows, open_source
from trainer.data.text import Corpus
from trainer.effects import runs_per_token
from trainer.evaluate import evaluate_tokens
from trainer.model.lm import Layer
from trainer.optimise.initialise import initial_params
from trainer.optimise.stack import Stack

TRAINING = TrainingConfig(batch_size=64, buffer_tokens=480, total_training_steps=20)
FREE = 10**15


@pytest.fixture
def corpus(gpt2, text_file):
    return Corpus(str(text_file), gpt2.tokenizer, 16, held_out_fraction=0.1)


def of_run(gpt2, corpus, cache_gb, layers=(1, 2), steps=20, **options) -> Cost:
    activations = ActivationsConfig(model=gpt2.name, cache_gb=cache_gb)
    saes = SAEOptions(hook_layer=list(layers), expansion_factor=4, **options).decide()
    stacks = [[each for each in saes if each.hook_layer == layer] for layer in layers]
    source = open_source(gpt2, activations, list(layers), corpus, 1280, 480, seed=0)
    return expected(source, gpt2, stacks, TRAINING, "cpu", corpus.held_out(4), steps, 128)


def test_bytes_of_memory_and_disk(gpt2, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    row = 2 * 4 * 8 * 2  # layers, heads, d_head, float16
    parameters = 2 * 2 * 4 * (32 * (2 * 8 + 1) + 8)  # layers, points, heads, of a head
    in_flight = 4 * 2 * 2 * 64 * 32  # float32, input and error, of two points
    live = of_run(gpt2, corpus, 0, k=[4, 8])
    assert live.memory == 480 * row + 128 * row + 16 * parameters + in_flight and live.cache == live.gpu == 0
    cached = of_run(gpt2, corpus, 1, k=[4, 8])
    assert cached.memory - live.memory == 480 * row, "the next rows are read meanwhile"
    assert cached.cache == 86 * 15 * row  # 86 contexts hold 1,280 tokens
    assert cached.checkpoints == live.checkpoints == 28 * parameters


def test_seconds_are_those_of_what_is_left(gpt2, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(cost, "_seconds", lambda work, device: work() is None or 1.0)  # whatever it is
    source = open_source(gpt2, ActivationsConfig(model=gpt2.name), [1], corpus, 1280, 480, seed=0)
    source.fill(gpt2, corpus, lambda done, total: None)
    harvested, left, nothing = (of_run(gpt2, corpus, 1, layers=(1,), k=[4, 8], steps=steps) for steps in (20, 5, 0))
    assert harvested.model == 0 and harvested.cache == 0, "it is in the cache"
    assert harvested.saes == 20 and left.saes == 5
    assert (nothing.model, nothing.saes, nothing.memory, nothing.checkpoints) == (0, 0, 0, 0)
    assert nothing.evaluation == harvested.evaluation > 0
    assert of_run(gpt2, corpus, 1, layers=(1, 2), k=[4, 8]).saes == 40, "layers take turns"
    live = of_run(gpt2, corpus, 0, layers=(3,), k=[4])
    assert live.model == 20 * 64 / 64, "1,280 tokens at the rate of four contexts a second"


@pytest.mark.parametrize("n_saes", [1, 3])
def test_runs_of_an_evaluation(gpt2, corpus, monkeypatch, n_saes):
    """The share of text on which heads are replaced alone depends on the text, between bounds."""
    ran = []
    final = Layer.final
    monkeypatch.setattr(Layer, "final", lambda self, resid, z=None: ran.append(resid.shape[0]) or final(self, resid, z))
    contexts = corpus.held_out(80)
    rows = gpt2.layer(1).z(contexts)
    options = SAEOptions(hook_layer=1, expansion_factor=4, k=list(range(2, 2 + n_saes))).decide()
    params = initial_params(options[0], rows.flatten(0, 1), 32, torch.Generator().manual_seed(0))
    stack = Stack(options, [params] * n_saes, torch.ones(4, 8), TRAINING)
    saes = [stack.finished(point) for point in range(n_saes)]
    evaluate_tokens(gpt2.layer(1), saes, contexts, 1)
    said, found = runs_per_token(gpt2.n_heads, n_saes, 80), sum(ran) / len(contexts)
    of_heads = 4 * (1 + n_saes)
    assert 3 + n_saes + of_heads / 8 <= found <= 3 + n_saes + of_heads / 2 + 1
    assert 3 + n_saes + of_heads / 8 <= said <= 3 + n_saes + of_heads / 2
    assert runs_per_token(gpt2.n_heads, n_saes, 5) == 3 + n_saes + of_heads, "of few contexts all"


@pytest.mark.parametrize(
    ("short", "free", "sentence"),
    [
        ("memory", {"memory": 10}, "of memory and 0 MB are free: lower --buffer_gb"),
        ("cache", {"cache": 10}, "lower --cache_gb"),
        ("out", {"out": 10}, "choose another --out"),
        (None, {}, None),
    ],
)
def test_what_does_not_fit_is_refused_before_the_harvest(
    gpt2_folder, text_file, tmp_path, monkeypatch, capsys, short, free, sentence
):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    memory = SimpleNamespace(available=free.get("memory", FREE))
    monkeypatch.setattr(cost.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(
        "trainer.room.free_disk", lambda folder: free.get("cache" if folder.name == "cache" else "out", FREE)
    )
    command = tiny_run(gpt2_folder, text_file, tmp_path / "out", "--total_training_steps=4", "--batch_size=64")
    status = main(command)
    said = capsys.readouterr()
    assert "The run takes about" in said.out and "evaluation" in said.out
    shards = list((tmp_path / "cache").rglob("shard-*"))
    if short is None:
        assert status == 0 and shards
    else:
        assert status == 2 and sentence in said.err and not shards
        assert not list((tmp_path / "out").glob("*/config.json"))


def test_the_buffer_is_bounded_over_all_layers(gpt2, corpus):
    row = 4 * 8 * 2
    cfg = replace(TRAINING, buffer_tokens=10_000, buffer_gb=2 * 1000 * row / 1e9)
    assert [buffer_rows(gpt2, n_layers, cfg) for n_layers in (1, 2, 4)] == [1000, 500, 250]
    assert buffer_rows(gpt2, 1, replace(cfg, buffer_gb=1)) == 10_000
    with pytest.raises(ValueError, match="holds 50 tokens of 20 layers at a time, less than a batch of 64"):
        buffer_rows(gpt2, 20, cfg)
    source = open_source(gpt2, ActivationsConfig(model=gpt2.name, cache_gb=0), [1, 2], corpus, 1280, 480, seed=0)
    assert next(batches(source, 64, seed=0)).dtype == torch.float16, "as it is kept"
