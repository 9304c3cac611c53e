"""Rows reach the trainer complete, shuffled and at the right step, from the disk as from the model."""

from collections import defaultdict
from itertools import chain, islice

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import write_data_set
from trainer import ranks
from trainer.config import ActivationsConfig
from trainer.data import buffer
from trainer.data.buffer import CachedActivations, LiveActivations, batches, harvest, open_source
from trainer.data.text import Corpus
from trainer.files import load_tensors, save_tensors

LAYER = 2


@pytest.fixture
def corpus(gpt2, text_file):
    return Corpus(str(text_file), gpt2.tokenizer, 16, held_out_fraction=0.1)


@pytest.fixture
def cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path))
    monkeypatch.setattr(buffer, "_SHARD_CONTEXTS", 8)
    return tmp_path


def cached(gpt2, corpus, n_tokens, buffer_rows=480) -> CachedActivations:
    config = ActivationsConfig(model=gpt2.name)
    return open_source(gpt2, config, [LAYER], corpus, n_tokens, buffer_rows, seed=0)


def only_folder(source):
    (folder,) = source.keys
    return folder


def fill(source, gpt2, corpus) -> list[int]:
    seen = []
    source.fill(gpt2, corpus, lambda done, total: seen.append(total))
    return seen


def same_rows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal as collections, up to what another batch shape changes in the last bit of float16."""
    return a.shape == b.shape and torch.allclose(a.float().sort(0).values, b.float().sort(0).values, atol=4e-3)


def test_the_cache_holds_what_the_model_computes(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 1000)
    fill(source, gpt2, corpus)
    contexts = torch.stack(list(corpus.train()))[:8]
    shard = load_file(only_folder(source) / "shard-00000.safetensors")["z"]
    expected = gpt2.layer(LAYER).z(contexts)[:, 1:].flatten(0, 1)
    assert shard.dtype == torch.float16
    assert torch.allclose(shard.float(), expected, atol=2e-3)
    groups = torch.cat([next(source.groups(g)) for g in range(source._n_groups)])
    every = torch.cat(list(harvest(gpt2, [LAYER], torch.stack(list(corpus.train()))[: len(groups) // 15])))
    assert same_rows(groups, every), "one pass serves every row once"


def test_a_second_run_never_runs_the_model(gpt2, corpus, cache_root, monkeypatch):
    fill(cached(gpt2, corpus, 1000), gpt2, corpus)
    monkeypatch.setattr(type(gpt2), "z_of", lambda *a: pytest.fail("the language model ran"))
    again = cached(gpt2, corpus, 1000)
    assert again.missing() == {}
    assert fill(again, gpt2, corpus) == []
    assert len(next(batches(again, 32, seed=0))) == 32
    shorter = cached(gpt2, corpus, 300)
    assert shorter.missing() == {}, "a shorter run reads a longer run's cache"


def test_an_interrupted_harvest_goes_on_and_a_longer_run_extends(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 1000)

    def stop(done, total):
        if done > 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        source.fill(gpt2, corpus, stop)
    left = source.missing()
    assert 0 < len(left) < len(source._shard_rows)
    buffer._shard(only_folder(source), 0).unlink()  # a gap before the shard that is there
    fill(source, gpt2, corpus)
    contexts = torch.stack(list(corpus.train()))
    for index in range(3):
        expected = torch.cat(list(harvest(gpt2, [LAYER], contexts[8 * index : 8 * index + 8])))
        assert torch.allclose(
            load_file(buffer._shard(only_folder(source), index))["z"].float(), expected[:, 0].float(), atol=4e-3
        )
    *whole, last = sorted(only_folder(source).glob("shard-*"))
    before = {path: path.stat().st_mtime_ns for path in whole}
    assert len(load_file(last)["z"]) == 3 * 15, "no more is harvested than is asked for"
    longer = cached(gpt2, corpus, 2000)
    assert only_folder(longer) == only_folder(source) and longer.missing()
    fill(longer, gpt2, corpus)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(load_file(last)["z"]) == 8 * 15
    expected = torch.cat(list(harvest(gpt2, [LAYER], contexts[64:72])))
    assert torch.allclose(load_file(last)["z"].float(), expected[:, 0].float(), atol=4e-3)
    assert source.missing() == {}, "what a longer run completed is whole for a shorter one"


@pytest.mark.parametrize("n_tokens", [1, 239, 240, 241, 480, 960, 961, 1001])
def test_as_many_tokens_as_asked_for_rounded_up_to_contexts(gpt2, corpus, cache_root, n_tokens):
    """However short the last shard is, every group holds a batch of what was asked for, at most of a buffer."""
    source = cached(gpt2, corpus, n_tokens, buffer_rows=200)
    assert source.distinct_tokens == -(-n_tokens // 15) * 15
    groups = [source._shards_of(group) for group in range(source._n_groups)]
    assert sorted(chain.from_iterable(groups)) == list(range(len(source._shard_rows)))
    sizes = [source.rows(group) for group in range(3 * source._n_groups)]
    assert min(sizes) >= min(n_tokens, 120) and max(sizes) < 120 + 200


def test_a_shorter_run_reads_the_first_rows_of_a_longer_cache(gpt2, corpus, cache_root):
    fill(cached(gpt2, corpus, 1000), gpt2, corpus)
    shorter = cached(gpt2, corpus, 150)
    assert shorter.missing() == {} and shorter.rows(0) == 150
    expected = torch.cat(list(harvest(gpt2, [LAYER], torch.stack(list(corpus.train()))[:10])))
    assert same_rows(next(shorter.groups(0)), expected)


def test_other_weights_under_the_same_name_have_another_cache(gpt2, corpus, cache_root, monkeypatch):
    before = only_folder(cached(gpt2, corpus, 500))
    weight = gpt2.model.blocks[0].attn.W_V
    original = weight.data[0, 0, 0].item()  # + 1 - 1 would not give back the last bit
    weight.data[0, 0, 0] += 1
    try:
        assert only_folder(cached(gpt2, corpus, 500)) != before
    finally:
        weight.data[0, 0, 0] = original


def test_another_model_layer_or_text_has_another_cache(gpt2, llama, corpus, cache_root):
    folders = {only_folder(cached(gpt2, corpus, 500))}
    config = ActivationsConfig(model=gpt2.name)
    folders.add(only_folder(open_source(gpt2, config, [LAYER + 1], corpus, 500, 480, seed=0)))
    folders.add(only_folder(open_source(llama, config, [LAYER], corpus, 500, 480, seed=0)))
    assert len(folders) == 3


def test_a_damaged_shard_is_refused_by_name(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 500)
    fill(source, gpt2, corpus)
    shard = only_folder(source) / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        source.missing()


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_starting_later_gives_the_same_batches(gpt2, corpus, cache_root, kind):
    if kind == "cached":
        source = cached(gpt2, corpus, 1000, buffer_rows=360)
        fill(source, gpt2, corpus)
    else:
        source = LiveActivations(gpt2, [LAYER], corpus, 60, buffer_rows=360)
    stream = batches(source, 50, seed=3)
    first = [next(stream) for _ in range(40)]  # several groups, and a second pass of the cache
    for start in (1, 7, 25):
        assert torch.equal(next(batches(source, 50, seed=3, start=start)), first[start])
    assert not torch.equal(next(batches(source, 50, seed=4)), first[0]), "another seed, another order"


def test_rows_are_shuffled_across_contexts(gpt2, corpus, cache_root):
    source = LiveActivations(gpt2, [LAYER], corpus, 60, buffer_rows=600)
    batch = next(batches(source, 60, seed=0))
    in_order = next(source.groups(0))[:60].float()
    assert not torch.isin(batch[:, 0, 0, 0], in_order[:, 0, 0, 0]).all()


def test_live_and_cached_serve_the_same_rows(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 720)
    fill(source, gpt2, corpus)
    disk = torch.cat([load_file(path)["z"] for path in sorted(only_folder(source).glob("shard-*"))])
    live = next(LiveActivations(gpt2, [LAYER], corpus, 60, buffer_rows=720).groups(0))
    assert torch.allclose(live[:, 0].float(), disk[: len(live)].float(), atol=2e-3)


def test_the_live_source_is_used_where_the_cache_would_be_too_large(gpt2, corpus, cache_root):
    config = ActivationsConfig(model=gpt2.name, cache_gb=1e-6)
    assert isinstance(open_source(gpt2, config, [LAYER], corpus, 10_000, 480, 0), LiveActivations)


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_distinct_tokens_bound_what_is_read(gpt2, corpus, cache_root, kind):
    """A long run over few distinct tokens sees the same rows on every pass."""
    config = ActivationsConfig(model=gpt2.name, cache_gb=16 if kind == "cached" else 0)
    source = open_source(gpt2, config, [LAYER], corpus, 240, 10_000, seed=0)
    if kind == "cached":
        fill(source, gpt2, corpus)
    assert source.rows(0) == 240
    first, second = (next(source.groups(group)) for group in (0, 1))
    assert same_rows(first, second)


def test_too_little_text_for_a_batch_is_refused(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 100)
    fill(source, gpt2, corpus)
    with pytest.raises(ValueError, match="fewer than one batch"):
        next(batches(source, 4096, seed=0))


def test_values_beyond_float16_are_refused(gpt2, corpus, monkeypatch):
    monkeypatch.setattr(type(gpt2), "z_of", lambda self, tokens, layers: [torch.full((*tokens.shape, 4, 8), 1e6)])
    with pytest.raises(ValueError, match="do not fit in float16"):
        next(harvest(gpt2, [LAYER], torch.stack(list(corpus.train()))[:2]))


def test_several_layers_share_one_forward_and_serve_the_same_rows(gpt2, corpus, cache_root, monkeypatch):
    """A layer that is there already is not harvested again, and each layer's rows are those it has alone."""
    alone = cached(gpt2, corpus, 500)
    fill(alone, gpt2, corpus)
    asked = []
    original = type(gpt2).z_of
    monkeypatch.setattr(type(gpt2), "z_of", lambda self, t, layers: asked.append(layers) or original(self, t, layers))
    both = open_source(gpt2, ActivationsConfig(model=gpt2.name), [1, LAYER], corpus, 500, 480, seed=0)
    fill(both, gpt2, corpus)
    assert asked and all(layers == [1] for layers in asked)
    one, two = (next(batches(source, 64, seed=0)) for source in (alone, both))
    assert two.shape == (64, 2, 4, 8) and torch.equal(one[:, 0], two[:, 1])
    contexts = torch.stack(list(corpus.train()))[:8]
    live = LiveActivations(gpt2, [1, LAYER], corpus, 8, buffer_rows=120)
    assert torch.allclose(next(live.groups(0))[:, 0].float(), gpt2.layer(1).z(contexts)[:, 1:].flatten(0, 1), atol=4e-3)


def test_a_stream_that_is_too_short_is_refused_not_repeated(gpt2, corpus, cache_root):
    source = LiveActivations(gpt2, [LAYER], corpus, 100_000, buffer_rows=480)
    with pytest.raises(ValueError, match="too few for this run"):
        for _ in source.groups(corpus.n_train_contexts // 32 - 1):
            pass


@pytest.fixture
def data_set(gpt2, tmp_path):
    """Of three streams."""
    files = [[{"text": f"{file} {i} " * (5 + i)} for i in range(10 + file)] for file in range(13)]
    corpus = Corpus(str(write_data_set(tmp_path / "data", files)), gpt2.tokenizer, 16, 0.1)
    assert corpus.n_streams == 3
    return corpus


def test_any_number_of_processes_reads_the_groups_of_one_each_from_its_streams(gpt2, data_set, monkeypatch):
    """Passes of 13 contexts of every stream in groups of 4: a group may go over into the next pass."""
    as_rows = lambda contexts: contexts[:, 1:].reshape(-1, 1, 1, 1)  # noqa: E731 - the tokens themselves
    monkeypatch.setattr(buffer, "harvest", lambda lm, layers, contexts: [as_rows(contexts)])
    of_each = [list(islice(data_set.train(0, stream), 13)) * 3 for stream in range(3)]
    expected = [torch.stack([*chain(*(each[g * 4 : g * 4 + 4] for each in of_each))]) for g in range(2, 6)]
    train, opened = Corpus.train, set()
    monkeypatch.setattr(Corpus, "train", lambda self, at, stream: opened.add(stream) or train(self, at, stream))
    for n in range(1, 8):
        monkeypatch.setattr(ranks, "size", lambda n=n: n)
        parts = []
        for index in range(n):
            monkeypatch.setattr(ranks, "index", lambda index=index: index)
            opened.clear()
            source = LiveActivations(gpt2, [LAYER], data_set, 38, buffer_rows=14 * 15)
            assert source.distinct_tokens == 39 * 15 and source.rows(0) == 12 * 15
            parts.append(list(islice(source.groups(2), 4)))
            assert opened == {context // 4 for context in range(12 * index // n, 12 * (index + 1) // n)}
        for group, whole in zip(zip(*parts, strict=True), expected, strict=True):
            assert (torch.cat(group) == as_rows(whole)).all()


@pytest.mark.parametrize("n_streams", [1, 3, 16])
def test_every_process_harvests_shards_of_few_streams(n_streams, monkeypatch):
    for n in range(1, 40):
        monkeypatch.setattr(ranks, "size", lambda n=n: n)
        of_each = defaultdict(list)
        for index in range(40 * n_streams):
            of_each[buffer._harvester(index, n_streams)].append(index % n_streams)
        assert set(of_each) == set(range(n))
        assert max(len(set(found)) for found in of_each.values()) == -(-n_streams // n)


def test_the_cache_holds_each_shard_from_its_stream(gpt2, data_set, cache_root):
    source = cached(gpt2, data_set, 15 * 44)
    fill(source, gpt2, data_set)
    for index in range(6):
        contexts = torch.stack(list(islice(data_set.train(index // 3 * 8, index % 3), 8 if index < 5 else 4)))
        found = load_file(buffer._shard(only_folder(source), index))["z"]
        assert torch.allclose(found.float(), gpt2.layer(LAYER).z(contexts)[:, 1:].flatten(0, 1), atol=4e-3)


def test_a_shard_that_breaks_while_training_is_one_sentence(gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 1000, buffer_rows=120)
    fill(source, gpt2, corpus)
    stream = batches(source, 100, seed=0)
    next(stream)
    broken = cache_root / "broken"
    for path in sorted(only_folder(source).glob("shard-*")):
        broken.write_bytes(b"broken")
        broken.replace(path)  # not in place: the next group is being read, and what is mapped must not become shorter
    with pytest.raises(ValueError, match=r"is damaged .* harvests it again"):
        list(islice(stream, 20))


@pytest.mark.parametrize("fault", ["a bit", "renamed", "of another layer", "not a number"])
def test_a_shard_with_other_content_than_was_written_is_refused(fault, gpt2, corpus, cache_root):
    source = cached(gpt2, corpus, 1000, buffer_rows=120)
    fill(source, gpt2, corpus)
    folder = only_folder(source)
    shard, other = (folder / f"shard-{index:05d}.safetensors" for index in (0, 1))
    if fault == "a bit":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(content)
    elif fault == "renamed":
        other.write_bytes(shard.read_bytes())
    elif fault == "of another layer":
        z = load_tensors(shard, f"{folder.name} 0")
        save_tensors(shard, z, f"{folder.name[:-1]}x 0")
    else:
        z = load_tensors(shard, f"{folder.name} 0")
        z["z"][3, 0, 0] = float("nan")
        save_tensors(shard, z, f"{folder.name} 0")
    sentences = {"a bit": "does not match its checksum", "not a number": "not finite"}
    with pytest.raises(ValueError, match=sentences.get(fault, "another file than its name says")):
        list(islice(batches(source, 100, seed=0), 40))
