"""Several processes write what one writes: every statistic, the tables, stopped and resumed, and if one dies."""

import os
import re
import shutil
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from analysis.__main__ import main
from analysis.attribution import Reader
from analysis.corpus import passes, run, running_statistics
from analysis.corpus.descriptions import FurtherFirings
from analysis.corpus.mean_pattern import MeanPattern
from analysis.corpus.passes import Strips, choose_examples, chunks, feed, sources_on_repeats
from analysis.corpus.running_statistics import FeatureStatistics, Tally, collect, state
from analysis.store import Analysis
from tests.processes import commands, in_processes
from trainer import ranks
from trainer.block_diag import BlockDiagSAE
from trainer.checkpoint import Checkpoint

CONTEXTS, LENGTH = 40, 24
OPTIONS = ["--tokens=600", "--score_tokens=300", "--examples=4", "--quantile_examples=3", "--device=cpu"]
NAMES = ["batchtopk", "dense"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several forwards of two chunks, and limits that a short text reaches."""
    monkeypatch.setattr(passes, "_LM_TOKENS", 128)
    monkeypatch.setattr(passes, "_CHUNK_TOKENS", 64)
    monkeypatch.setattr(running_statistics, "DFA_FIRINGS", 40)
    monkeypatch.setattr(running_statistics, "HEAD_TOKENS", 250)
    monkeypatch.setattr(running_statistics, "COFIRING_PAIRS", 2000)


def given(lm, dense):
    """A reader, and contexts of which each is there twice."""
    torch.manual_seed(0)
    sae = BlockDiagSAE(*((1, lm.n_heads * lm.d_head, 24) if dense else (lm.n_heads, lm.d_head, 6)))
    sae.b_enc.data.normal_(-1)
    contexts = torch.randint(1, 40, (CONTEXTS, LENGTH))
    contexts[:, 0] = 0
    contexts[CONTEXTS // 2 :] = contexts[: CONTEXTS // 2]
    return Reader(sae.requires_grad_(False), lm.layer(1)), contexts


def seen(lm, dense):
    """Everything that is kept of both passes and of repeated tokens."""
    (reader, contexts), layer = given(lm, dense), lm.layer(1)

    def empty():
        return [FeatureStatistics(reader, lm.d_vocab, n_top=7), MeanPattern(lm.n_heads, 9)]

    statistics, pattern = filled = empty()
    for part in torch.arange(CONTEXTS).split(17):  # collected in between, as to save
        list(feed(layer.lm, contexts, part, {layer.index: filled}))
        collect(filled, empty())
    ranks.copied([*state(statistics.top).values(), *state(statistics.sample).values()])
    examples = choose_examples(statistics, 4, LENGTH)

    def nothing():
        return [Strips(reader, examples), FurtherFirings(reader, CONTEXTS - 9)]

    strips, further = second = nothing()
    for part in torch.arange(CONTEXTS).split(17):
        list(feed(layer.lm, contexts, part, {layer.index: second}))
        collect(second, nothing())
    (repeats,), on_repeats = sources_on_repeats(layer.lm, {layer.index: [reader]}, 17, LENGTH, seed=1)[layer.index]
    if not ranks.is_first():
        return None
    statistics.fires_on.pairs(), statistics.sources.reads.pairs()  # count what is pending
    for largest in (statistics.top, statistics.sample):
        largest.value[largest.at < 0] = 0  # of places that hold nothing
    kept = {"statistics": statistics, "pattern": pattern, "repeats": repeats, "on_repeats": on_repeats}
    tensors = {name: value for what, each in kept.items() for name, value in state(each, f"{what}.").items()}
    found = state(strips) | {name: state(further)[name] for name in ("feature", "context", "position", "value")}
    for names in (["active_example", "active_position", "active_value"], ["feature", "context", "position", "value"],
                  ["source_example", "source_position", "source_dfa", "source_attention"]):  # fmt: skip
        rows = np.array([found.pop(name).double().numpy() for name in names])
        tensors[names[0]] = torch.from_numpy(rows[:, np.lexsort(rows)])  # in which order they lie, matters nowhere
    return tensors | found


@pytest.mark.parametrize(("n", "dense"), [(2, True), (3, False)])
def test_n_processes_have_seen_what_one_has(gpt2, n, dense, monkeypatch):
    monkeypatch.setattr(running_statistics, "_random", lambda at, feature: (at * 7 % 5).float() / 5)
    expected = seen(gpt2, dense)
    assert (expected["statistics.sources.firings"] < expected["statistics.firings"]).any(), "some stop to be attributed"
    assert 2000 <= expected["statistics.cofiring.pairs"] < expected["statistics.firings"].sum()
    assert expected["statistics.sources.head_tokens"] < expected["statistics.n_tokens"]
    found, *others = in_processes(n, seen, gpt2, dense)
    assert others == [None] * (n - 1) and found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.float64:  # sums
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name} {m}"
            )
        else:
            assert torch.equal(found[name], value), name


def test_a_limit_is_reached_at_the_end_of_a_chunk(gpt2):
    """Of the features that fire 40 times, and of co-firing pairs: chunks after that are left out, none before."""
    (reader, contexts), layer = given(gpt2, False), gpt2.layer(1)
    statistics = FeatureStatistics(reader, gpt2.d_vocab, n_top=7)
    list(feed(layer.lm, contexts, torch.arange(CONTEXTS), {layer.index: [statistics]}))
    before = torch.zeros_like(statistics.firings)
    attributed, pairs = before.clone(), 0
    for chunk in chain(*chunks(layer, contexts, torch.arange(CONTEXTS))):
        fires = (reader.encode(chunk) > 0).sum((0, 1)).flatten()
        attributed += fires * (before < 40)
        pairs += int(fires.sum()) * int(before.sum() < 2000)
        before += fires
    assert torch.equal(statistics.sources.firings, attributed) and int(statistics.cofiring.pairs) == pairs


def test_tallies_that_overflowed_are_together_too_low_by_what_both_are():
    torch.manual_seed(0)
    tallies, counts = [Tally(1000, capacity=200) for _ in range(2)], torch.zeros(1000, dtype=torch.int64)
    for tally in tallies:
        for _ in range(20):
            token = (torch.randn(2000).abs() * 150).long().clamp_max(999)
            tally.add(torch.zeros_like(token), token)
            tally.pairs()
            counts += torch.bincount(token, minlength=1000)
    floors = [int(tally.floor) for tally in tallies]
    one, other = tallies
    one.absorb(other)
    _, token, found = one.pairs()
    assert min(floors) > 0 and len(token) <= 200 and int(one.floor) >= sum(floors)
    assert (found <= counts[token]).all() and (counts[token] <= found + one.floor).all()
    left_out = torch.ones(1000, dtype=torch.bool)
    left_out[token] = False
    assert counts[left_out].max() <= one.floor


def copies(trained, folder) -> list[str]:
    for name in NAMES:
        shutil.copytree(trained / name, folder / name)
    return [str(folder / name) for name in NAMES]


def values(column) -> np.ndarray:
    """Of a column, lists joined with their lengths in front."""
    if column.dtype != object or not len(column) or not isinstance(column.iloc[0], np.ndarray):
        return column.to_numpy()
    return np.concatenate([np.array([len(each) for each in column]), *column])


def assert_same_analyses(one: Path, other: Path) -> None:
    """Integers, ids and texts exactly, floats to rounding of sums."""
    names = sorted(each.name for each in one.iterdir())
    assert names == sorted(each.name for each in other.iterdir()), "and no state is left"
    for file in sorted((one / "analysis").glob("*.parquet")):
        a, b = (pq.read_table(path / "analysis" / file.name).to_pandas() for path in (one, other))
        assert a.dtypes.tolist() == b.dtypes.tolist() and len(a) == len(b), file.name
        for name in a:
            expected, found = values(a[name]), values(b[name])
            if expected.dtype.kind == "f":
                assert np.allclose(found, expected, rtol=1e-6, atol=1e-9, equal_nan=True), (file.name, name)
            else:
                assert a[name].isna().equals(b[name].isna()), (file.name, name)
                there = ~np.asarray([each is None or each != each for each in expected])
                assert (expected[there] == found[there]).all(), (file.name, name)
    a, b = (Analysis(Checkpoint(path)).meta for path in (one, other))
    for key in a.keys() - {"seconds", "checkpoint"}:
        assert b[key] == (pytest.approx(a[key]) if key in ("FVU", "slots_by_chance") else a[key]), key


def and_say(write):
    def written(path, *more):
        os.write(2, f"process {ranks.index()} writes {path}\n".encode())  # sys.stderr is quiet but in the first
        return write(path, *more)

    return written


def stopped_after(turns):
    """`main`, with SIGTERM to the last process during a turn; the others hear of it from that one."""

    def stopped(arguments):
        left, real = [turns], passes.rounds

        def counted(*more):
            for each in real(*more):
                left[0] -= 1
                if left[0] == 0 and ranks.index() == ranks.size() - 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield each

        passes.rounds = counted
        run.write_atomically, run.store.write = and_say(run.write_atomically), and_say(run.store.write)
        return main(arguments)

    return stopped


@pytest.mark.slow
def test_a_stopped_analysis_saves_once_and_goes_on_with_another_number_of_processes(trained, tmp_path, capfd):
    """Stopped in the first pass by three, in the second by two, and ended by three; five forwards and eight or so."""
    whole, halves = copies(trained, tmp_path / "whole"), copies(trained, tmp_path / "halves")
    assert main([*whole, *OPTIONS]) == 0
    capfd.readouterr()
    for n, turns, resume, said in ((3, 1, [], "first pass, 12 of 20"), (2, 4, ["--resume"], "second pass, ")):
        assert commands(n, stopped_after(turns), [*halves, *OPTIONS, *resume]) == [[130] * n]
        err = capfd.readouterr().err
        assert err.count("Saved: ") == err.count(said) == 1 and "Traceback" not in err
        for path in halves:
            assert err.count(f"process 0 writes {path}/.analysis.state") == 1
        assert not re.search("process [12] writes", err) and not (tmp_path / "halves" / "dense" / "analysis").exists()
    assert commands(2, main, [*halves, *OPTIONS, "--seed=1", "--resume"]) == [[2] * 2]
    err = capfd.readouterr().err
    assert err.count("cannot be resumed (it was begun with other options") == 1 == err.count("error: ")
    assert commands(3, stopped_after(0), [*halves, *OPTIONS, "--resume"]) == [[0] * 3]
    said = capfd.readouterr()
    assert said.out.count("Writing ") == 2 and not re.search("process [12] writes", said.err)
    for one, other in zip(whole, halves, strict=True):
        assert_same_analyses(Path(one), Path(other))


def killed(arguments):
    """`main`, saving after every turn, whose second process is killed in the second pass of the first start."""
    load, fill, first = run.Job.load, Strips.update, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    run._SAVE_SECONDS = -1

    def and_die(strips, batch):
        if first and ranks.index() == 1 and batch and int(batch[0].ids[0]) > 10:
            os.kill(os.getpid(), signal.SIGKILL)
        fill(strips, batch)

    def and_tell(job):
        load(job)
        os.write(2, f"process {ranks.index()} goes on at {job.stage} {job.done > 0}\n".encode())

    Strips.update, run.Job.load = and_die, and_tell
    return main(arguments)


def test_an_analysis_with_a_killed_process_ends_and_the_same_command_goes_on(trained, tmp_path, capfd):
    """As torchrun starts it again, and nobody says --resume."""
    whole, halves = (copies(trained, tmp_path / name)[0] for name in ("whole", "halves"))
    assert main([whole, *OPTIONS]) == 0
    capfd.readouterr()
    assert commands(2, killed, [halves, *OPTIONS], max_restarts=1) == [[2, -signal.SIGKILL], [0, 0]]
    err = capfd.readouterr().err
    assert err.count("error: another process of this job ended") == 1 and "Traceback" not in err
    assert all(err.count(f"process {index} goes on at 2 True") == 1 for index in (0, 1))
    assert_same_analyses(Path(whole), Path(halves))


def test_what_cannot_be_shared_is_refused_once(trained, tmp_path, capfd):
    assert commands(3, main, [*copies(trained, tmp_path), *OPTIONS, "--device=cpu:0"]) == [[2] * 3]
    assert capfd.readouterr().err.count("device cpu:0 cannot be shared by 3 processes") == 1
