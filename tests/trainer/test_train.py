"""Training as a whole: sweeps, resuming to the bit, and a command line that does what it says."""

import dataclasses
import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.helpers import PATIENCE, ROOT, save_tiny_gpt2, tiny_run, write_text
from trainer import checkpoint, cli, config, train
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint
from trainer.data import buffer
from trainer.locks import is_locked, locked
from trainer.model.lm import LanguageModel
from trainer.optimise.stack import Stack
from trainer.precision import tf32
from trainer.run import Run

REFERENCE = ["--l1_coefficients=[2]", "--hook_layer=4", "--expansion_factor=32", "--total_training_steps=50000"]


@pytest.fixture
def command(gpt2_folder, text_file, tmp_path, monkeypatch):
    """A short run on the tiny GPT-2; returns (arguments, output folder)."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "checkpoints"
    more = ("--total_training_steps=12", "--batch_size=128", "--name=run", "--save_every=5")
    return tiny_run(gpt2_folder, text_file, out, *more), out


@contextmanager
def interrupted_at(step, monkeypatch):
    """Ctrl-C in the middle of the given step."""
    original = Stack.update
    sent = []

    def update(self, z):
        if self.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, z)

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "update", update)
        yield


SPARSITY = {
    "april": "--l1_coefficients=[1,8]", "bricken": "--l1_coefficients=[0.1,0.8]", "gated": "--l1_coefficients=[1,8]",
    "jumprelu": "--l1_coefficients=[1,8]", "topk": "--k=[4,9]", "batchtopk": "--k=[4,9]",
}  # fmt: skip


def weights(path):
    return load_file(path / "sae.safetensors")


def assert_same_weights(one, other, exactly=True):
    """To the bit where the same steps were done twice; not where other shapes round differently."""
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]) if exactly else torch.allclose(one[key], other[key], 1e-3, 1e-4), key


@pytest.mark.parametrize("recipe", list(SPARSITY))
@pytest.mark.parametrize("block", ["head", "dense"])
def test_every_recipe_trains_saves_loads_and_evaluates_and_a_sweep_is_its_points(command, recipe, block):
    """As on a CPU; test_stack has the batched matmul of a GPU."""
    arguments, out = command
    arguments = [*arguments, f"--recipe={recipe}", f"--block={block}", "--dead_after_tokens=500", "--lr=3e-3"]
    flag, (_, heavy) = SPARSITY[recipe].split("=")[0], json.loads(SPARSITY[recipe].split("=")[1])
    assert main([*arguments, SPARSITY[recipe], "--name=both"]) == 0
    assert main([*arguments, f"{flag}={heavy}", "--name=alone"]) == 0
    paths = sorted(out.glob("both-*"))
    (together,) = (path for path in paths if path.name.endswith(("_8", "_0.8", "k9")))
    assert_same_weights(together, out / "alone", exactly=False)
    assert len(paths) == 2
    for path in (*paths, out / "alone"):
        saved = Checkpoint(path)
        sae, figures = saved.sae, saved.eval
        assert saved.is_complete and saved.config.tokens_seen == 12 * 128
        assert (sae.n_blocks, sae.width) == ((4, 8) if block == "head" else (1, 32))
        assert sae.activation == {"topk": "topk", "april": "relu", "bricken": "relu"}.get(recipe, "jumprelu")
        assert len(figures["L0_per_head"]) == sae.n_blocks and len(figures["FVU_per_head"]) == 4
        assert figures["n_tokens"] >= 200 and 0 < figures["L0"] < sae.d_sae
        assert not (path / "training_state").exists()
        lines = checkpoint.read_metrics(path)
        assert [line["step"] for line in lines] == [4, 8, 12]
        for key in ("loss", "squared_error", "grad_norm", "L0", "FVU", "dead_fraction", "encoder_norm", "decoder_norm"):
            assert all(line[key] >= 0 for line in lines), key
        assert len(lines[0]["FVU_per_head"]) == 4 and 0 <= lines[0]["activations_share"] <= 1
    if recipe in ("topk", "batchtopk"):
        assert Checkpoint(together).eval["L0"] == pytest.approx(9, rel=0.35 if recipe == "batchtopk" else 0.02)
    if recipe == "batchtopk":
        assert (weights(together)["threshold"] > 0).all()


def test_layers_and_recipes_share_one_stream(command):
    """Several layers and recipes of one command are what each is alone."""
    arguments, out = command
    assert main([*arguments, "--hook_layer=[1,3]", "--recipe=[april,topk]", "--k=4", "--name=all"]) == 0
    assert main([*arguments, "--hook_layer=3", "--recipe=topk", "--k=4", "--name=alone"]) == 0
    names = {path.name for path in out.glob("all-*")}
    assert names == {f"all-L{layer}-{what}" for layer in (1, 3) for what in ("april-x4-l1_2", "topk-x4-k4")}
    assert_same_weights(out / "all-L3-topk-x4-k4", out / "alone", exactly=False)
    assert Checkpoint(out / "all-L3-april-x4-l1_2").config.model.hook_name == "blocks.3.attn.hook_z"
    assert not torch.equal(weights(out / "all-L1-topk-x4-k4")["W_dec"], weights(out / "alone")["W_dec"])


def test_a_yaml_sweep_names_points_that_differ_in_anything(command, tmp_path):
    arguments, out = command
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        "lr: 0.002\npoints:\n- {recipe: batchtopk, k: [4, 8]}\n"
        "- {preset: reference, l1_coefficients: 3, expansion_factor: 4}\n"
        "- {recipe: batchtopk, k: 4, normalize: global, label: batchtopk-global}\n"
    )
    assert main([*arguments[:-2], f"--config={sweep}", "--save_every=5", "--name=s"]) == 0
    names = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert names == {
        "s-L1-batchtopk-x4-k4",
        "s-L1-batchtopk-x4-k8",
        "s-L1-reference-x4-l1_3",
        "s-L1-batchtopk-global-x4-k4",
    }
    settings = Checkpoint(out / "s-L1-reference-x4-l1_3").config.options.sae
    assert settings.lr == 0.002 and settings.init == "linear" and settings.normalize == "global"


@pytest.mark.parametrize("recipe", ["april", "jumprelu", "gated", "topk"])
def test_figures_while_training_are_those_of_the_saved_sae(command, monkeypatch, recipe):
    """The last training line, recomputed from sae.safetensors on raw z with the same batch."""
    arguments, out = command
    batches = []
    original = Stack.update
    monkeypatch.setattr(Stack, "update", lambda self, z: (batches.append(z), original(self, z))[1])
    # A learning rate of almost nothing: the weights of the last line are the saved ones.
    assert main([*arguments, "--lr=1e-12", f"--recipe={recipe}"]) == 0
    sae = Checkpoint(out / "run").sae
    line, z = checkpoint.read_metrics(out / "run")[-1], batches[-1]
    error = (sae(z) - z).pow(2).sum((0, 2))
    assert line["MSE"] == pytest.approx((error.sum() / len(z)).item(), rel=1e-3)
    assert line["FVU"] == pytest.approx((error.sum() / (z - z.mean(0)).pow(2).sum()).item(), rel=1e-3)
    assert line["L0"] == pytest.approx((sae.encode(z) > 0).float().sum((1, 2)).mean().item(), rel=1e-2)


def test_float16_weights_are_what_is_evaluated(command):
    arguments, out = command
    assert main([*arguments, "--weights_dtype=float16"]) == 0
    assert all(tensor.dtype == torch.float16 for tensor in weights(out / "run").values())
    assert Checkpoint(out / "run").sae.W_enc.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [["--recipe=april", "--l1_coefficients=[1,8]"], ["--k=[4,8]"], ["--recipe=bricken"]]
)
def test_an_interrupted_run_resumes_to_the_same_weights(command, monkeypatch, options):
    arguments, out = command
    arguments = [*arguments, *options, "--eval_every=4"]
    assert main([*arguments, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main([*arguments, "--name=halves"]) == 130
    names = [path.name.removeprefix("whole") for path in out.glob("whole*")]
    for name in names:
        assert not Checkpoint(out / f"halves{name}").is_complete
        assert Checkpoint(out / f"halves{name}").sae, "an interrupted run can be looked at"
    assert main([*arguments, "--name=halves", "--resume=true"]) == 0
    for name in names:
        assert_same_weights(out / f"whole{name}", out / f"halves{name}")
        lines = [checkpoint.read_metrics(out / f"{which}{name}") for which in ("whole", "halves")]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] == [4, 8, 12]
        assert lines[0][0]["held_out_FVU"] == lines[1][0]["held_out_FVU"] > 0


def test_run_yaml_repeats_and_resumes_one_sae_of_a_sweep(command, monkeypatch):
    """Whatever today's defaults are: everything that was decided is written down."""
    arguments, out = command
    both = [*arguments, "--preset=reference", "--l1_coefficients=[1,8]", "--expansion_factor=4", "--lr=2e-3"]
    with interrupted_at(7, monkeypatch):
        assert main([*both, "--name=halves"]) == 130
    (heavy,) = out.glob("halves*l1_8")
    options = yaml.safe_load((heavy / "run.yaml").read_text())
    named = {each.name for group in cli.GROUPS for each in dataclasses.fields(group)}
    assert set(options) == named and options["init"] == "linear" and options["max_grad_norm"] == 1.0
    monkeypatch.setitem(config._COMMON, "normalize", "none")
    assert main([f"--config={heavy / 'run.yaml'}", "--resume=true"]) == 0
    assert main([f"--config={heavy / 'run.yaml'}", "--name=again"]) == 0
    assert_same_weights(heavy, out / "again")
    assert Checkpoint(heavy).recipe == Checkpoint(out / "again").recipe == "reference"
    assert Checkpoint(heavy).eval == Checkpoint(out / "again").eval


def test_a_resumed_run_shuffles_as_it_began_whatever_is_left_of_it(command, monkeypatch):
    """Alone a layer would not be bound by what all layers of its sweep need together; its run.yaml says by what."""
    arguments, out = command
    arguments = [*arguments, "--hook_layer=[1,2]", "--buffer_gb=1.1e-4"]
    assert main([*arguments, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main([*arguments, "--name=halves"]) == 130
    whole, halves = (sorted(out.glob(f"{name}*")) for name in ("whole", "halves"))
    (shuffled,) = {Checkpoint(path).config.options.training.buffer_tokens for path in (*whole, *halves)}
    assert shuffled == 1.1e-4 * 1e9 / 2 // (2 * 4 * 8 * 2) < 1024
    assert main(["--config", str(halves[1] / "run.yaml"), "--resume=true"]) == 0
    assert main([*arguments, "--name=halves", "--resume=true"]) == 0
    assert main(["--config", str(halves[0] / "run.yaml"), "--name=alone"]) == 0
    for path, again in zip(whole, halves, strict=True):
        assert_same_weights(path, again)
    assert_same_weights(whole[0], out / "alone")


def test_a_run_that_streams_goes_on_streaming_when_the_cache_is_there(command, monkeypatch):
    arguments, out = command
    streamed = [*arguments, "--cache_gb=0"]
    assert main([*streamed, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main([*streamed, "--name=halves"]) == 130
    assert main([*arguments, "--name=other"]) == 0, "which fills the cache"
    assert main([*streamed, "--name=halves", "--resume=true"]) == 0
    assert Checkpoint(out / "other").config.source == "cached"
    assert Checkpoint(out / "halves").config.source == "live"
    assert_same_weights(out / "whole", out / "halves")


@pytest.mark.parametrize(
    ("asked", "layers"), [("2", [2]), ("[1,2]", [1, 2]), ("0-2, 4", [0, 1, 2, 4]), ("all", [0, 1, 2, 3, 4, 5])]
)
def test_layers_are_asked_for_by_number_range_or_all(asked, layers, gpt2_folder):
    options = vars(cli.parser().parse_args([f"--model={gpt2_folder}", f"--hook_layer={asked}", "--k=[4,8]"]))
    _, saes, _ = cli.build(options)
    assert [(each.hook_layer, each.k) for each in saes] == [(layer, k) for layer in layers for k in (4, 8)]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("every", "must be a number, a list as [4,5] or 0-5,8, or all; got 'every'"),
        ("5-3", "names no layer"),
        ("1,0-2", "names a layer twice"),
        ("1.5", "must be a number"),
        ("0-9", "hook_layer 6 is out of range"),
    ],
)
def test_layers_that_are_none_are_refused(asked, sentence, command, capsys):
    arguments, out = command
    assert main([*arguments, f"--hook_layer={asked}"]) == 2
    assert sentence in capsys.readouterr().err and not list(out.glob("[!.]*"))


def test_all_layers_of_a_model_that_is_not_there(command, capsys):
    arguments, _ = command
    assert main([*arguments, "--model=./nowhere", "--hook_layer=all"]) == 2
    assert "does not say how many layers it has" in capsys.readouterr().err


def test_run_yaml_means_its_run_from_every_folder(command, monkeypatch, tmp_path, capsys):
    arguments, _ = command
    arguments = [*arguments, "--out=checkpoints"]
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    run = tmp_path / "here" / "checkpoints" / "run"
    monkeypatch.chdir(tmp_path / "there")
    assert main([f"--config={run / 'run.yaml'}", "--resume=true"]) == 0
    assert Checkpoint(run).is_complete and not (tmp_path / "there" / "checkpoints").exists()
    # A relative --out is another folder from here: it is said, and what is trained is the same.
    capsys.readouterr()
    assert main([*arguments, "--resume=true"]) == 0
    other = tmp_path / "there" / "checkpoints" / "run"
    assert f"Nothing to resume: {other} is not there" in capsys.readouterr().out
    assert_same_weights(run, other)


def test_the_command_of_a_refusal_resumes_a_run_that_was_moved(command, monkeypatch, tmp_path, capsys):
    arguments, out = command
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    moved = out.rename(tmp_path / "a b")
    assert main([*arguments, f"--out={moved}"]) == 2
    command_line = capsys.readouterr().err.split("`")[-2]
    assert main(shlex.split(command_line)[3:]) == 0
    assert Checkpoint(moved / "run").is_complete and not out.exists()


@pytest.mark.parametrize("source", ["cached", "live"])
def test_a_configuration_of_a_data_set_trains_and_resumes(command, monkeypatch, tmp_path, capsys, source):
    arguments, out = command
    folder = tmp_path / "texts"
    for name, documents in (("en", 60), ("de", 90)):
        (folder / name).mkdir(parents=True)
        write_text(folder / name / "a.jsonl", documents)
    files = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    arguments = [*arguments, f"--dataset={folder}", f"--cache_gb={int(source == 'cached')}"]
    assert main(arguments) == 2
    assert "has the configurations en, de: name one with --dataset_config" in capsys.readouterr().err
    assert not (out / "run").exists()
    arguments.append("--dataset_config=de")
    assert main([*arguments, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    assert main([*arguments, "--dataset_config=en", "--resume=true"]) == 2
    assert "begun on another text" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    moved = folder.rename(tmp_path / "moved")
    assert main([f"--config={out / 'run' / 'run.yaml'}", f"--dataset={moved}", "--resume=true"]) == 0
    assert_same_weights(out / "whole", out / "run")
    config = Checkpoint(out / "run").config
    assert (config.source, config.text.dataset_config, config.text.name) == (source, "de", str(moved))
    assert Checkpoint(out / "run").eval == Checkpoint(out / "whole").eval


def test_saves_of_different_steps_resume_from_the_last_common_one(command, monkeypatch):
    """Killed while the states of a stack were being written: one has step 10 too, the other only step 5."""
    arguments, out = command
    both = [*arguments, "--recipe=april", "--l1_coefficients=[1,8]"]
    assert main([*both, "--name=whole"]) == 0
    names = [path.name.removeprefix("whole") for path in out.glob("whole*")]
    original = Run.save_state

    def killed(self, step, state):
        if step == 10 and self.path.name.endswith("l1_8"):
            raise KeyboardInterrupt
        original(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_state", killed)
        assert main([*both, "--name=halves"]) == 130
    states = sorted(path.name for path in out.glob("halves*/training_state/*"))
    assert states == ["step-0000005.safetensors"] * 2 + ["step-0000010.safetensors"]
    assert main([*both, "--name=halves", "--resume=true"]) == 0
    for name in names:
        assert_same_weights(out / f"whole{name}", out / f"halves{name}")


def test_a_kill_between_any_two_writes_leaves_something_to_go_on_with(command, monkeypatch, capsys):
    """Before the first config.json, with half a state beside the states, and before the states are dropped."""
    arguments, out = command
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_config", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(arguments) == 130
    assert (out / "run").is_dir()
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    (out / "run" / "training_state" / ".step-0000010.safetensors.17.partial").write_bytes(b"half")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "drop_states", lambda self, keep: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*arguments, "--resume=true"]) == 130
    assert main([*arguments, "--resume=true"]) == 0
    assert not (out / "run" / "training_state").exists()
    assert main([*arguments, "--resume=true"]) == 2 and "is complete" in capsys.readouterr().err


def test_a_resumed_sweep_cannot_grow(command, monkeypatch, capsys):
    arguments, out = command
    with interrupted_at(7, monkeypatch):
        assert main([*arguments, "--k=[4,8]"]) == 130
    before = sorted(out.glob("*/training_state/*"))
    assert main([*arguments, "--k=[4,8,16]", "--resume=true"]) == 2
    assert "is not part of the interrupted run" in capsys.readouterr().err
    assert sorted(out.glob("*/training_state/*")) == before != []


def test_a_run_does_not_go_on_on_another_text(command, monkeypatch, capsys, tmp_path, text_file):
    arguments, _ = command
    text = tmp_path / "text.jsonl"
    shutil.copy(text_file, text)
    arguments = [f"--dataset={text}" if each.startswith("--dataset") else each for each in arguments]
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:-5]))
    assert main([*arguments, "--resume=true"]) == 2
    assert "was begun on another text" in capsys.readouterr().err


def test_a_point_that_is_complete_is_left_alone_when_the_others_resume(command, monkeypatch):
    arguments, out = command
    both = [*arguments, "--recipe=april", "--l1_coefficients=[1,8]", "--name=run"]
    original = Run.save

    def killed(self, sae, step, status):
        if status == "complete" and self.path.name.endswith("l1_8"):
            raise KeyboardInterrupt
        original(self, sae, step, status)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", killed)
        assert main(both) == 130
    (done,) = out.glob("*l1_1")
    before = (done / "config.json").read_bytes()
    assert main([*both, "--resume=true"]) == 0
    assert (done / "config.json").read_bytes() == before
    assert all(Checkpoint(path).is_complete for path in out.glob("[!.]*"))


def test_the_address_of_an_online_run_is_kept(command, monkeypatch):
    import wandb

    class Online:
        url, summary = "https://wandb.ai/someone/attn-saes/runs/abc12345", {}

        def log(self, *figures, **step): ...

        def finish(self): ...

    monkeypatch.setattr(wandb, "init", lambda **settings: Online())
    arguments, out = command
    assert main([*arguments, "--wandb=online", "--name=logged"]) == 0
    assert Checkpoint(out / "logged").config.wandb_url == Online.url


def test_wandb_writes_an_offline_run(command):
    arguments, out = command
    assert main([*arguments, "--wandb=offline", "--name=logged"]) == 0
    (run,) = (out / "logged" / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    content = file.read_bytes()
    assert b"FVU_per_head/head_3" in content and b"eval/KL_score" in content


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model=no-such-model"], "unknown model 'no-such-model'"),
        (["--hook_layer=99"], "hook_layer 99 is out of range"),
        (["--hook_layer=-1"], "hook_layer must be 0 or more"),
        (["--l1_coefficients=[-2]"], "l1_coefficients must be finite and 0 or more"),
        (["--l1_coefficients=[]"], "name at least one"),
        (["--recipe=topk", "--l1_coefficients=[2]"], "topk has no l1_coefficients: its sparsity is k"),
        (["--recipe=april", "--k=[2]"], "april has no k"),
        (["--k=[0]"], "k must be at least 1"),
        (["--k=500", "--recipe=topk"], "k must lie between 1 and 128"),
        (["--k=500"], "k must lie between 1 and 128"),
        (["--k=40", "--k_scope=head"], "k must lie between 1 and 32"),
        (["--k=[4,4]"], "names the same SAE twice"),
        (["--lr=0"], "lr must be positive"),
        (['--points=[{"recipe": "topk", "depth": 3}]'], "unknown option depth"),
        (["--label=a/b"], "leave out slashes"),
        (["--name=../b"], "leave out slashes"),
        (['--points=[{"k": 4}, {"k": 4, "lr": 0.1}]'], "tell them apart with a label"),
        (["--dataset=nowhere.txt"], "nowhere.txt does not exist"),
        (["--context_size=5000"], "exceeds the 256 positions"),
        (["--batch_size=0"], "batch_size must be at least 1"),
        (["--buffer_tokens=10"], "must hold at least one batch"),
        (["--device=gpu"], "device 'gpu' cannot be used"),
        (["--out=/proc/nowhere"], "nothing can be written to /proc/nowhere"),
        (["--eval_tokens=100000000"], "ask for fewer"),
        (["--batch_size=100000", "--buffer_tokens=100000"], "fewer than one batch"),
    ],
)
def test_bad_input_gets_one_sentence(command, capsys, extra, message):
    arguments, out = command
    assert main([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not out.exists() or not list(out.glob("*/sae.safetensors"))


def test_an_existing_checkpoint_is_never_overwritten(command, capsys):
    arguments, out = command
    assert main(arguments) == 0
    before = (out / "run" / "sae.safetensors").read_bytes()
    assert main(arguments) == 2 and "exists already" in capsys.readouterr().err
    assert main([*arguments, "--resume=true"]) == 2 and "is complete" in capsys.readouterr().err
    assert (out / "run" / "sae.safetensors").read_bytes() == before


def test_resuming_with_another_configuration_is_refused(command, capsys, monkeypatch):
    arguments, _ = command
    with interrupted_at(2, monkeypatch):
        assert main(arguments) == 130
    assert main([*arguments, "--resume=true", "--lr=0.5"]) == 2
    assert "was begun with lr=" in capsys.readouterr().err


def test_an_interrupted_harvest_says_that_it_is_kept(command, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.model.lm.LanguageModel.z_of", stop)
    assert main(command[0]) == 130
    assert "Activations harvested" in capsys.readouterr().err


def test_an_interrupted_evaluation_needs_no_training_again(command, monkeypatch):
    arguments, out = command

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.train.evaluate", stop)
        assert main(arguments) == 130
    monkeypatch.setattr(Stack, "update", lambda self, z: pytest.fail("a step was trained again"))
    assert main([*arguments, "--resume=true"]) == 0
    assert Checkpoint(out / "run").eval["n_tokens"] >= 200
    assert not (out / "run" / "training_state").exists()


def test_a_full_disk_loses_nothing(command, capsys, monkeypatch):
    """The state saved at step 5 survives a disk that is full at step 10, in the words of safetensors."""
    arguments, out = command

    def full(tensors, path, metadata):
        if "step-0000010" in path.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.files.save_file", full)
        assert main(arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main([*arguments, "--resume=true"]) == 0
    steps = [line["step"] for line in checkpoint.read_metrics(out / "run")]
    assert steps == [4, 8, 12], "lines that were logged after the save are not there twice"


def hub_cache(home, text_file) -> dict[str, str]:
    """A hub cache that holds a tiny GPT-2 under its real name, and an environment without network."""
    repo = home / "hub" / "models--gpt2"
    save_tiny_gpt2(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    return {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "ATTN_SAES_CACHE": str(home / "cache"),
        "WANDB_MODE": "offline",
        "PYTHONPATH": str(ROOT),
    }


def test_the_reference_command_on_a_tiny_gpt2_from_the_hub_cache(tmp_path, text_file):
    """The reference's flags word for word; only sizes that a tiny model and text need are added."""
    environment = hub_cache(tmp_path / "hf", text_file)
    small = ["--total_training_steps=8", "--batch_size=256", "--buffer_tokens=2048", "--eval_tokens=200"]
    command = [sys.executable, "-m", "trainer", *REFERENCE, "--model=gpt2-small", f"--dataset={text_file}", *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "checkpoints").glob("[!.]*")
    saved = Checkpoint(path)
    sae, options = saved.sae, saved.config.options.sae
    assert path.name == "gpt2-small-L4-april-x32-l1_2"
    assert saved.config.model.hook_name == "blocks.4.attn.hook_z"
    assert (sae.n_blocks, sae.width, sae.features_per_block) == (4, 8, 32 * 8), "sizes come from the model"
    assert options.recipe == "april" and options.l1_coefficient == 2
    assert Checkpoint(path).eval["n_tokens"] >= 200


def test_the_reference_flags_parse_to_the_reference_run(capsys):
    with pytest.raises(SystemExit):
        main([*REFERENCE, "--model=gpt2-small", "--print_config"])
    printed = capsys.readouterr().out
    for line in ("model: gpt2-small", "hook_layer: 4", "expansion_factor: 32", "total_training_steps: 50000"):
        assert line in printed
    assert "batch_size: 4096" in printed


def test_a_terminated_process_saves_its_state(tmp_path, gpt2_folder, text_file):
    environment = {**os.environ, "ATTN_SAES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "trainer", f"--model={gpt2_folder}", f"--dataset={text_file}", "--hook_layer=1",
        "--total_training_steps=1000000", "--batch_size=64", "--buffer_tokens=1024", "--context_size=32",
        "--eval_tokens=100", "--log_every=1", "--wandb=disabled", "--name=long", "--expansion_factor=4",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "checkpoints" / "long" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.stat().st_size > 1000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "--resume=true goes on" in error
    assert list((tmp_path / "checkpoints" / "long" / "training_state").glob("step-*.safetensors"))
    config = json.loads((tmp_path / "checkpoints" / "long" / "config.json").read_text())
    assert config["status"] == "training" and config["steps"] > 0
    shutil.rmtree(tmp_path / "checkpoints")


# The trainer, which a signal that it does not catch ends up to 20 ms after the start of a step. A kill from outside
# would come after the last step on a busy machine.
DOOMED = """
import random, signal, sys
from trainer.__main__ import main
from trainer.optimise.stack import Stack
original = Stack.update
def update(self, z):
    if self.step == int(sys.argv[1]):
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 0.02))
    return original(self, z)
Stack.update = update
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_at_a_random_step_a_stacked_sweep_resumes_to_the_bit(command, tmp_path):
    """As by SIGKILL, nothing is cleared up."""
    arguments, out = command
    arguments = [*arguments, "--recipe=[batchtopk,jumprelu]", "--k=[4,9]", "--total_training_steps=60", "--log_every=1"]
    assert main([*arguments, "--name=whole"]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    halves = [sys.executable, "-m", "trainer", *arguments, "--name=halves"]
    doomed = [sys.executable, "-c", DOOMED, str(random.randrange(12, 40)), *halves[3:]]
    killed = subprocess.run(doomed, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert killed.returncode == -signal.SIGALRM, killed.stderr[-2000:]
    names = [path.name.removeprefix("whole") for path in out.glob("whole*")]
    assert len(names) == 3 and all((out / f"halves{name}").exists() for name in names)
    done = subprocess.run([*halves, "--resume=true"], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        assert_same_weights(out / f"whole{name}", out / f"halves{name}")


def test_the_wandb_sweep_file_composes_commands_that_parse(capsys):
    """What `wandb agent` makes of sweeps/wandb.yaml; the server's part cannot be tried without a network."""
    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb.yaml").read_text())
    names = sorted(sweep["parameters"])
    choices = [sweep["parameters"][name].get("values") or [sweep["parameters"][name]["value"]] for name in names]
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "${program}"] and sweep["program"] == "trainer"
    for values in itertools.product(*choices):
        arguments = [f"--{name}={value}" for name, value in zip(names, values, strict=True)]
        with pytest.raises(SystemExit) as done:
            main([*sweep["command"][4:-1], *arguments, "--print_config"])
        assert done.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert all(printed[name] == value for name, value in zip(names, values, strict=True))


def test_the_frontier_sweep_names_at_least_ten_saes(capsys):
    with pytest.raises(SystemExit):
        main([f"--config={ROOT / 'sweeps' / 'frontier.yaml'}", "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)
    _, saes, _ = cli.build(options)
    assert len(saes) >= 10 and {sae.recipe for sae in saes} >= {"april", "batchtopk", "topk", "jumprelu"}


@pytest.mark.parametrize("recipe", list(SPARSITY))
@pytest.mark.parametrize("block", ["head", "dense"])
def test_what_explodes_ends_with_its_name_and_keeps_the_state_before(recipe, block, command, capsys, monkeypatch):
    arguments, out = command
    arguments += [f"--recipe={recipe}", SPARSITY[recipe], f"--block={block}", "--log_every=1", "--save_every=3"]
    update = Stack.update

    def explode(self, z):
        update(self, z)
        if self.step == 6:  # a step that is saved: after it only the second SAE is beyond all bounds
            self.params["W_dec"][len(self.params["W_dec"]) // 2 :] *= 1e4

    with monkeypatch.context() as patch:
        patch.setattr(Stack, "update", explode)
        assert main(arguments) == 2
    said = capsys.readouterr().err
    paths = sorted(path for path in out.iterdir() if path.name.startswith("run"))
    assert any(f"{path.name} exploded at step 6" in said for path in paths) and "saved step is 3" in said
    for path in paths:
        assert [file.name for file in (path / "training_state").iterdir()] == ["step-0000003.safetensors"]
        assert all(value.abs().max() < 1e3 for value in weights(path).values())
    assert main([*arguments, "--resume=true"]) == 0


@pytest.mark.parametrize("recipe", list(SPARSITY))
def test_a_learning_rate_that_is_far_too_high_is_no_complete_run(recipe, command, capsys):
    arguments, out = command
    assert main([*arguments, f"--recipe={recipe}", SPARSITY[recipe], "--lr=1e6"]) == 2
    assert "exploded at step" in capsys.readouterr().err
    assert not list(out.glob("*/training_state/*")) and not list(out.glob("*/eval.json"))


def test_a_run_that_is_being_trained_is_not_trained_twice(command, capsys):
    arguments, out = command
    with locked([out / "run"]):
        held = subprocess.run(
            [sys.executable, "-m", "trainer", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
        )
        assert held.returncode == 2 and f"by process {os.getpid()} on " in held.stderr
        assert is_locked(out / "run") and not (out / "run").exists()
    assert not is_locked(out / "run")
    assert main(arguments) == 0
    assert main(arguments) == 2 and "--name run --resume=true`" in capsys.readouterr().err


def test_a_changed_training_state_is_not_resumed(command, capsys, monkeypatch):
    arguments, out = command
    with interrupted_at(7, monkeypatch):
        assert main(arguments) == 130
    (state,) = (out / "run" / "training_state").iterdir()
    content = bytearray(state.read_bytes())
    content[-50] ^= 4
    state.write_bytes(content)
    assert main([*arguments, "--resume=true"]) == 2
    assert "does not match its checksum" in capsys.readouterr().err


def test_constant_activations_are_refused(command, capsys, monkeypatch):
    arguments, out = command
    z_of = LanguageModel.z_of
    monkeypatch.setattr(LanguageModel, "z_of", lambda self, *given: [z * 0 + 1 for z in z_of(self, *given)])
    assert main(arguments) == 2
    assert "layer 1 are constant" in capsys.readouterr().err and not (out / "run").exists()


def test_a_gpu_trains_in_tf32_and_evaluates_in_float32(command, monkeypatch):
    """What the run asks of torch, the harvest included; whether there is a GPU is decided in trainer/precision.py."""
    arguments, _ = command
    asked, seen = [], {"harvest": set(), "step": set(), "evaluation": set()}

    @contextmanager
    def noted(device, wanted):
        asked.append(wanted)
        yield
        asked.pop()

    def watch(place, name, what):
        original = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, **k: seen[what].add(tuple(asked)) or original(*a, **k))

    monkeypatch.setattr(train, "tf32", noted)
    watch(buffer, "harvest", "harvest")
    watch(Stack, "update", "step")
    watch(train, "evaluate", "evaluation")
    for wanted in ("true", "false"):
        assert main([*arguments, f"--tf32={wanted}", f"--name={wanted}"]) == 0
    assert seen["step"] == {(True,), (False,)} and seen["evaluation"] == {()}
    assert seen["harvest"] == {(True,)}  # the second run reads the cache


def test_tf32_is_of_a_gpu_and_ends():
    before = torch.get_float32_matmul_precision()
    for device, wanted, found in (("cuda", True, "high"), ("cuda:1", False, before), ("cpu", True, before)):
        with tf32(device, wanted):
            assert torch.get_float32_matmul_precision() == found
        assert torch.get_float32_matmul_precision() == before
