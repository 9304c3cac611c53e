"""Several processes train what one process trains: the same rows, the same steps, one writer, and what if one dies."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import PATIENCE, ROOT, decided, edit_json, tiny_run, write_data_set
from tests.processes import commands, in_processes
from tests.trainer.optimise.test_stack import data
from trainer import checkpoint, ranks
from trainer import evaluate as evaluation
from trainer import run as trained_run
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint
from trainer.config import ActivationsConfig, TrainingConfig
from trainer.data import buffer, streams
from trainer.data.buffer import LiveActivations, batches, open_source
from trainer.data.text import Corpus
from trainer.kernels import select, sparse
from trainer.kernels.order import nth_largest
from trainer.model.lm import LanguageModel
from trainer.optimise.initialise import initial_params, input_scale
from trainer.optimise.stack import Stack

BATCH, STEPS = 48, 50
# Each as a sweep of two SAEs in one stack.
KINDS = {
    "april": {"recipe": "april", "l1_coefficient": [0.5, 3.0]},
    "bricken": {"recipe": "bricken", "l1_coefficient": [0.5, 3.0], "resample_fraction": 0.25, "max_grad_norm": 1.0},
    "gated": {"recipe": "gated", "l1_coefficient": [0.5, 3.0]},
    "jumprelu": {"recipe": "jumprelu", "l1_coefficient": [0.5, 3.0]},
    "topk": {"recipe": "topk", "k": [4, 9]},
    "topk of each head": {"recipe": "topk", "k": [3], "k_scope": "head"},
    "batchtopk": {"recipe": "batchtopk", "k": [6]},
    "batchtopk of each head": {"recipe": "batchtopk", "k": [3], "k_scope": "head"},
}


def growing_rows():
    """The rows of a batch larger and larger: its shares are not alike."""
    return data(STEPS * BATCH) * torch.linspace(0.5, 2, BATCH).repeat(STEPS)[:, None, None]


def trained(kind, rows):
    """A stack after all steps on this process's share of every batch, and what was met on the way."""
    options = dict(KINDS[kind])
    key = "k" if "k" in options else "l1_coefficient"
    saes = [decided(**options | {key: value, "hook_layer": 0, "expansion_factor": 4, "lr": 5e-3})
            for value in options.pop(key)]  # fmt: skip
    scale = input_scale(rows, saes[0].normalize)
    if saes[0].block == "dense":
        scale = scale.view(1, -1)
    params = initial_params(
        saes[0], rows.reshape(len(rows), *scale.shape) * scale, 32, torch.Generator().manual_seed(0)
    )
    params["b_enc"][:, :6] -= 3.0  # die
    cfg = TrainingConfig(total_training_steps=STEPS, batch_size=BATCH, dead_after_tokens=5 * BATCH)
    stack = Stack(saes, [params] * len(saes), scale, cfg)
    norms, revived = [], False
    for batch in rows.split(BATCH):
        stack.update(batch.chunk(ranks.size())[ranks.index()])
        norms.append(stack._last.grad_norm)
        revived |= "aux_k" in stack._last.out.terms or stack.resampled_at > 0
    figures = [stack.figures(point) for point in range(len(saes))]
    states = [{name: value.clone() for name, value in stack.state(point).items()} for point in range(len(saes))]
    errors = [stack.relative_error(point) for point in range(len(saes))]
    return {"states": states, "figures": figures, "norms": torch.stack(norms), "errors": errors, "revived": revived}


def each_kind(kinds):
    torch.set_default_dtype(torch.float64)
    rows = growing_rows()
    return {kind: trained(kind, rows) for kind in kinds}


def assert_close(one, other, what, rtol=1e-6, atol=1e-8):
    """Of tensors, numbers, and lists and dictionaries of them."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        for key in one:
            assert_close(one[key], other[key], f"{what} {key}", rtol, atol)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), what
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_close(a, b, f"{what} {index}", rtol, atol)
    elif one is None or other is None:  # not measurable
        assert one is other, what
    else:
        torch.testing.assert_close(
            torch.as_tensor(other), torch.as_tensor(one), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}"
        )


@pytest.mark.parametrize(
    ("n", "kinds"),
    [(2, list(KINDS)), (3, ["bricken", "topk"]), pytest.param(3, list(KINDS), marks=pytest.mark.slow)],
)
def test_n_processes_take_the_steps_of_one_on_the_same_rows(n, kinds, float64):
    """Weights, moments, counters, thresholds, figures and histograms, after every kind of thing has happened."""
    expected, found = each_kind(kinds), in_processes(n, each_kind, kinds)
    for kind, of_one in expected.items():
        assert of_one["norms"].max() > 1, "clipped"
        assert of_one["revived"] or KINDS[kind]["recipe"] in ("april", "gated", "jumprelu")
        for of_rank in found:
            assert_close(of_one, of_rank[kind], kind)
            for state, first in zip(of_rank[kind]["states"], found[0][kind]["states"], strict=True):
                assert all(torch.equal(state[name], first[name]) for name in state), "all have one SAE, to the bit"


def nth(share):
    """Of groups of which this process has a share, as `share` of it says."""
    generator = torch.Generator().manual_seed(1)
    many = (3 * torch.randn(5000, generator=generator)).exp()
    ties = torch.randint(1, 4, (300,), generator=generator).float()
    groups = [many, ties, many[:40], many[:0], many[:1], many * 1e-42]
    counts = [700, 150, 41, 3, 1, 20]
    return nth_largest([group[share(len(group))] for group in groups], counts)


def uneven(n):
    """The first process has most, the last one nothing."""
    begin, end = ([0, 5 * n // 6, n, n][ranks.index() + each] for each in (0, 1))
    return slice(begin, end)


def test_the_nth_largest_of_all_is_that_of_one(monkeypatch):
    """Ties, fewer values than asked for, none, one, and the smallest that there are."""
    expected = nth(lambda n: slice(0, n))
    assert expected[2] == expected[2].clamp_min(1e-30) and expected[3] == 0 and 0 < expected[5] < 1e-38
    for found in in_processes(3, nth, uneven):
        assert torch.equal(found, expected)


def smallest(share, guess):
    """That is kept of a batch in each of two groups, as a GPU finds it and as a CPU does."""
    x = torch.randn(4, 90, 20, generator=torch.Generator().manual_seed(2))[:, share(90)].contiguous()
    counts, guess = torch.tensor([100, 300]), torch.tensor(guess)
    params = {"W_enc": torch.eye(20).repeat(4, 1, 1), "b_enc": torch.zeros(4, 20)}
    _, found = sparse.batch_top_k(params, x, counts, guess.nan_to_num())
    return torch.stack([select.smallest_kept(x, counts.tolist(), guess), found])


@pytest.mark.parametrize("guess", [[0.1, 0.1], [9.0, 0.5], [float("nan")] * 2])
def test_what_is_kept_of_a_batch_does_not_depend_on_where_it_is_looked_for(guess):
    expected = smallest(lambda n: slice(0, n), [float("nan")] * 2)
    assert (expected > 0.5).all()
    for found in in_processes(2, smallest, uneven, guess):
        assert torch.allclose(found, expected)


PER_CONTEXT, CONTEXTS = 15, 44


class Numbers(Corpus):
    """A text whose tokens are numbers."""

    name = fingerprint = "numbers"
    context_size, n_train_contexts, n_streams = PER_CONTEXT + 1, CONTEXTS, 1

    def __init__(self):
        pass

    def train(self, start=0, stream=0):
        numbers = torch.arange(CONTEXTS * PER_CONTEXT).view(CONTEXTS, PER_CONTEXT)
        yield from torch.cat([numbers[:, :1], numbers], 1)[start:]


class Numbered(LanguageModel):
    """A model whose z is its token, so that every row is known by its value."""

    n_heads = d_head = 1
    device, name = torch.device("cpu"), "numbers"

    def __init__(self):
        self.ran = []

    def fingerprint(self):
        return "numbers"

    def z_of(self, tokens, layers):
        self.ran += (tokens[:, 1] // PER_CONTEXT).tolist()
        return [tokens[..., None, None].float() for _ in layers]


def read(first, last, cache_gb, text=None):
    """Rows of this process's share of each step, two passes being 50 steps, and the contexts that its model ran on."""
    model, numbers, buffer._SHARD_CONTEXTS = Numbered(), text or Numbers(), 4
    config = ActivationsConfig(model="numbers", cache_gb=cache_gb)
    source = open_source(model, config, [0], numbers, CONTEXTS * PER_CONTEXT, 11 * PER_CONTEXT, seed=3)
    assert isinstance(source, LiveActivations) == (cache_gb == 0)
    if cache_gb:
        source.fill(model, numbers, lambda done, total: None)
    stream = batches(source, 24, 3, first)
    rows = [z.flatten().long().tolist() for z in islice(stream, last - first)]
    return rows, model.ran


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_no_number_of_processes_reads_other_rows_and_a_resumed_run_none_twice(cache_gb, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "one"))
    alone, ran = read(0, 50, cache_gb)
    assert all(len(set(step)) == 24 for step in alone)
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "several"))
    steps, contexts = [], []
    for n, first, last in ((2, 0, 7), (3, 7, 20), (1, 20, 30), (2, 30, 50)):
        found = in_processes(n, read, first, last, cache_gb)
        steps += [list(chain(*shares)) for shares in zip(*(rows for rows, _ in found), strict=True)]
        contexts.append([ran for _, ran in found])
    assert steps == alone
    a_pass = list(chain(*steps[: CONTEXTS // 11 * (11 * PER_CONTEXT // 24)]))
    assert len(set(a_pass)) == len(a_pass)
    if cache_gb:  # harvested once, by one of them
        assert sorted(chain(*contexts[0])) == sorted(ran) == list(range(CONTEXTS))
        assert all(contexts[0]) and not any(map(any, contexts[1:]))
    else:
        of_first, of_second = (set(part) for part in contexts[0])
        assert not of_first & of_second and of_first | of_second <= set(ran)


class Ids:
    """The tokenizer of records that hold token ids."""

    bos_token_id, eos_token_id = 0, 1

    def __len__(self):
        return 2048  # up to which float16 tells one from the next

    def get_vocab(self):
        return {}


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_of_a_data_set_each_process_reads_its_share(cache_gb, tmp_path, monkeypatch):
    """Of 13 uneven files in 3 streams; the rows are those of one process, after a change of their number too."""
    ids, files = iter(range(2, 2048)), [[] for _ in range(13)]
    for number in range(170):
        files[number % 17 % 13].append({"input_ids": list(islice(ids, 1 + number % 23))})
    rest = list(ids)
    for number, file in enumerate(files):
        file.append({"input_ids": rest[number::13]})
    text = Corpus(str(write_data_set(tmp_path / "data", files)), Ids(), PER_CONTEXT + 1)
    n_read, opened = Counter(), streams._open

    def counted(*which):
        for record in opened(*which):
            n_read[which[3]] += 1
            yield record

    monkeypatch.setattr(streams, "_open", counted)
    jobs = []
    for folder, *job in (("one", 1, 0, 50), ("a", 2, 0, 7), ("a", 3, 7, 20), ("a", 1, 20, 30), ("a", 2, 30, 50)):
        monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / folder))
        n, first, last = job
        jobs.append(in_processes(n, lambda *part: (read(*part, cache_gb, text)[0], set(n_read)), first, last))
    steps = [[list(chain(*shares)) for shares in zip(*(rows for rows, _ in found), strict=True)] for found in jobs]
    assert list(chain(*steps[1:])) == steps[0]
    a_pass = [row for row in chain(*steps[0][:25]) if row != Ids.eos_token_id]
    assert len(set(a_pass)) == len(a_pass) > 500
    of_two, of_three = ([streams_read for _, streams_read in job] for job in jobs[1:3])
    assert of_two == ([{0, 1}, {2}] if cache_gb else [{0, 1}, {1, 2}])
    assert cache_gb or of_three == [{0}, {1}, {2}]


@pytest.mark.parametrize("cache_gb", [0, 1])
def test_a_stream_that_ends_too_early_ends_all_with_one_sentence(cache_gb, command, tmp_path, capfd):
    """That only one of two processes reads."""
    texts = [[{"text": f"{file} {i} the head reads " * 20} for i in range(1 if file % 2 else 20)] for file in range(8)]
    folder = write_data_set(tmp_path / "data", texts)
    options = (f"--dataset={folder}", f"--cache_gb={cache_gb}", "--total_training_steps=80")
    assert commands(2, main, [*command[0], *options]) == [[2, 2]]
    said = capfd.readouterr().err
    assert said.count("tokens are read, as many of each of its 2 streams: too few for this run") == 1
    assert said.count("error:") == 1 and "Traceback" not in said


@pytest.fixture
def command(gpt2_folder, text_file, tmp_path, monkeypatch):
    """A short run on the tiny GPT-2, of a stack and an SAE of another layer; returns (arguments, output folder)."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "checkpoints"
    more = ("--total_training_steps=12", "--batch_size=126", "--save_every=5", "--eval_every=8", "--lr=3e-3")
    sweep = ("--recipe=[april,batchtopk]", "--k=[4,9]", "--dead_after_tokens=500")
    return tiny_run(gpt2_folder, text_file, out, *more, *sweep), out


def assert_same_runs(out, one, other, world_size):
    """Up to how sums round; eval.json and the log too."""
    names = [path.name.removeprefix(one) for path in out.glob(f"{one}*")]
    assert len(names) == 3 == len(list(out.glob(f"{other}*")))
    for name in names:
        a, b = out / f"{one}{name}", out / f"{other}{name}"
        assert_close(*(load_file(path / "sae.safetensors") for path in (a, b)), name, 1e-3, 1e-4)
        lines = [checkpoint.read_metrics(path) for path in (a, b)]
        for line in chain(*lines):
            del line["tokens_per_second"], line["activations_share"]
        assert_close(*lines, name, 1e-3, 1e-3)
        keys = ("L0", "FVU", "CE_clean", "CE_sae", "KL_sae_per_head", "KL_zero_per_head")
        assert_close(*({key: Checkpoint(path).eval[key] for key in keys} for path in (a, b)), name, 1e-2, 1e-3)
        config = Checkpoint(b).config
        assert Checkpoint(b).is_complete and (config.steps, config.world_size) == (12, world_size)
        assert sorted(each.name for each in b.iterdir()) == sorted(each.name for each in a.iterdir())


def interrupted(arguments):
    """`main`, with SIGTERM to the last process in the middle of its 7th step; the others hear of it from that one."""
    update = Stack.update

    def and_stop(stack, z):
        update(stack, z)
        if stack.step == 7 and stack.cfg.recipe == "april" and ranks.index() == ranks.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def and_say(write):
        def written(path, *more):
            os.write(2, f"process {ranks.index()} writes {path}\n".encode())  # sys.stderr is quiet but in the first
            write(path, *more)

        return written

    Stack.update = and_stop
    trained_run.save_tensors = and_say(trained_run.save_tensors)
    checkpoint.save_config = and_say(checkpoint.save_config)
    return main(arguments)


def test_a_stopped_job_saves_once_and_goes_on_with_another_number_of_processes(command, tmp_path, monkeypatch, capfd):
    arguments, out = command
    assert main([*arguments, "--name=whole"]) == 0
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "other"))  # harvested by all
    capfd.readouterr()
    assert commands(3, interrupted, [*arguments, "--name=halves"]) == [[130] * 3]
    said = capfd.readouterr()
    assert said.err.count("Saved: stopped at step") == 1 == said.out.count("Loading") and "Traceback" not in said.err
    for path in out.glob("halves*"):
        (state,) = (path / "training_state").iterdir()
        step = Checkpoint(path).config.steps
        assert state.name == f"step-{step:07d}.safetensors" and 7 <= step < 12
        assert said.err.count(f"process 0 writes {state}\n") == 1 and Checkpoint(path).config.world_size == 3
        assert f"process 0 writes {path}\n" in said.err and not re.search("process [12] writes", said.err)
    assert commands(2, main, [*arguments, "--name=halves", "--resume=true"]) == [[0, 0]]
    assert_same_runs(out, "whole", "halves", 2)
    paths = sorted(str(path) for path in out.glob("halves*"))
    for path in paths:
        edit_json(Path(path) / "eval.json", L0=0.0, CE_sae=99.0)
    assert commands(2, evaluation.main, [*paths, "--device=cpu"]) == [[0, 0]]
    assert_same_runs(out, "whole", "halves", 2)


def killed(arguments):
    """`main`, whose second process is killed before its 8th step, where it is started for the first time."""
    update, first = Stack.update, os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def and_die(stack, z):
        if stack.step == 7 and ranks.index() == 1 and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if ranks.is_first() and not first and 2 <= stack.step < 6:  # before, two steps are timed
            print(f"started at {stack.step}", file=sys.stderr)
        update(stack, z)

    Stack.update = and_die
    return main(arguments)


def test_a_job_with_a_killed_process_ends_and_the_same_command_goes_on(command, capfd):
    """As torchrun starts it again: what it keeps of the first start, and nobody says --resume=true."""
    arguments, out = command
    assert main([*arguments, "--name=whole"]) == 0
    capfd.readouterr()
    assert commands(2, killed, [*arguments, "--name=halves"], max_restarts=1) == [[2, -signal.SIGKILL], [0, 0]]
    said = capfd.readouterr().err
    assert said.count("error: another process of this job ended") == 1 and "Traceback" not in said
    assert said.count("started at 5") == 2 == said.count("started at")
    assert_same_runs(out, "whole", "halves", 2)


SCRIPT = """
import sys
from tests.trainer.test_ranks import killed
sys.exit(killed(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_goes_on_after_a_process_was_killed(command, tmp_path):
    """In earnest, most of which is importing; it has its own ways of ending the others and of starting all again."""
    arguments, out = command
    assert main([*arguments, "--name=whole"]) == 0
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, tmp_path / "script.py", *arguments, "--name=halves"], env=environment, capture_output=True,
        text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("error: another process of this job ended") == 1
    assert done.stderr.count("started at 5") == 2
    assert_same_runs(out, "whole", "halves", 2)


def test_what_cannot_be_shared_is_refused_once(command, capfd, monkeypatch):
    arguments, out = command
    for refused, sentence in (
        ("--batch_size=128", "batch_size 128 cannot be shared by 3 processes: make it a multiple of 3"),
        ("--device=cpu:0", "device cpu:0 cannot be shared by 3 processes"),
        ("--hook_layer=77", "hook_layer 77 is out of range"),
    ):
        assert commands(3, main, [*arguments, refused]) == [[2] * 3]
        assert capfd.readouterr().err.count(sentence) == 1
    assert not list(out.glob("[!.]*"))
    assert commands(2, main, ["--batch_size=none"]) == [[2] * 2]
    assert capfd.readouterr().err.count("usage:") == 1


def test_commands_that_share_nothing_are_refused_under_torchrun(monkeypatch, capsys):
    from analysis.match.__main__ import main as match

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert match(["nowhere", "nowhere else"]) == 2
    assert "this command runs in one process: start it without torchrun" in capsys.readouterr().err


def test_the_model_runs_on_a_device_of_its_own(command, monkeypatch):
    arguments, _ = command
    seen = []
    load, update = LanguageModel.load.__func__, Stack.update
    monkeypatch.setattr(LanguageModel, "load", classmethod(lambda cls, *a: seen.append(a[1]) or load(cls, *a)))
    monkeypatch.setattr(Stack, "update", lambda self, z: seen.append((self.scale.device, z.device)) or update(self, z))
    assert main([*arguments, "--lm_device=cpu:0", "--name=apart"]) == 0
    cpu = torch.device("cpu")
    assert seen[0] == "cpu:0" and set(seen[1:]) == {(cpu, cpu)}
