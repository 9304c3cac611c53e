"""Training: it finds a planted dictionary, resumes to the bit, and its command line does what it says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, save_tiny_gpt2
from safetensors.torch import load_file

from trainer import checkpoint
from trainer.__main__ import main
from trainer.block_diag import BlockDiagSAE
from trainer.config import TrainingConfig
from trainer.run import Run, lr_factor

REFERENCE = ["--l1_coefficients=[2]", "--hook_layer=4", "--expansion_factor=32", "--total_training_steps=50000"]


def test_a_planted_dictionary_is_recovered(tmp_path):
    """z_h = sum of a few of 32 known unit directions per head: training finds them, their L0 and a low FVU."""
    n_heads, d_head, planted, probability = 3, 24, 32, 0.04
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(n_heads, planted, d_head, generator=generator), dim=-1)

    def sample(n):
        on = torch.rand(n, n_heads, planted, generator=generator) < probability
        strength = on * (0.5 + torch.rand(n, n_heads, planted, generator=generator))
        return torch.einsum("nhf,hfd->nhd", strength, directions), on

    steps = 2000
    cfg = TrainingConfig(total_training_steps=steps, batch_size=512, lr=3e-3, wandb="disabled", log_every=steps)
    run = Run(tmp_path / "planted", 2.0, {"group": "planted", "model": {}, "text": {}, "training": {}}, cfg)
    z, _ = sample(8192)
    scale = (d_head**0.5 / z.norm(dim=-1).mean(0))[:, None].expand(n_heads, d_head)
    sae = BlockDiagSAE(n_heads, d_head, planted)
    sae.initialise(z.mean(0) * scale, torch.Generator().manual_seed(1))
    run.start(sae, scale)
    for _ in range(steps):
        run.update(sample(512)[0])

    folded = run.folded()
    cosine = torch.einsum("hpd,hfd->hpf", directions, folded.W_dec)
    assert cosine.amax(-1).mean() > 0.9
    z, on = sample(4096)
    with torch.no_grad():
        f = folded.encode(z)
        fvu = (folded(z) - z).pow(2).sum() / (z - z.mean(0)).pow(2).sum()
    assert fvu < 0.1
    l0, planted_l0 = ((each > 0).sum((1, 2)).float().mean().item() for each in (f, on))
    assert l0 == pytest.approx(planted_l0, rel=0.35)  # L1 leaves a haze of weak firings: 5.0 for 3.8


def test_schedules():
    factors = [lr_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1 and factors[80] == 1
    assert factors[90] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)
    assert lr_factor(0, 100, 0.0, 0.0) == 1


@pytest.fixture
def command(gpt2_folder, text_file, tmp_path, monkeypatch):
    """A short run on the tiny GPT-2; returns (arguments, output folder)."""
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "checkpoints"
    arguments = [
        f"--model={gpt2_folder}", f"--dataset={text_file}", f"--out={out}", "--hook_layer=1", "--expansion_factor=4",
        "--total_training_steps=12", "--batch_size=128", "--buffer_tokens=1024", "--context_size=32",
        "--eval_tokens=200", "--log_every=4", "--wandb=disabled", "--device=cpu", "--name=run", "--save_every=5",
    ]  # fmt: skip
    return arguments, out


@contextmanager
def interrupted_at(step, monkeypatch):
    """Ctrl-C in the middle of the given step."""
    original = Run.update
    sent = []

    def update(self, z):
        if self.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        original(self, z)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "update", update)
        yield


def test_several_coefficients_train_as_each_would_alone(command):
    arguments, out = command
    assert main([*arguments, "--l1_coefficients=[1,8]"]) == 0
    assert main([*arguments, "--l1_coefficients=[8]", "--name=alone"]) == 0
    together, alone = (load_file(out / name / "sae.safetensors") for name in ("run-l1_8", "alone"))
    assert all(torch.equal(together[key], alone[key]) for key in alone)
    light, heavy = (checkpoint.load_eval(out / name) for name in ("run-l1_1", "run-l1_8"))
    assert light["FVU"] < heavy["FVU"]
    config = checkpoint.load_config(out / "alone")
    assert config["status"] == "complete" and config["tokens_seen"] == 12 * 128
    assert config["model"]["processing"]["fold_value_biases"] is True
    assert not (out / "alone" / "training_state").exists()
    lines = checkpoint.load_metrics(out / "alone")
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert len(lines[0]["FVU_per_head"]) == 4


def test_figures_while_training_are_those_of_the_saved_sae(command, gpt2, monkeypatch):
    """The last training line, recomputed from sae.safetensors on raw z with the same batch."""
    arguments, out = command
    batches = []
    original = Run.update
    monkeypatch.setattr(Run, "update", lambda self, z: (batches.append(z), original(self, z))[1])
    # A learning rate of almost nothing: the weights of the last line are the saved ones.
    assert main([*arguments, "--lr=1e-12"]) == 0
    sae, _ = checkpoint.load(out / "run")
    line, z = checkpoint.load_metrics(out / "run")[-1], batches[-1]
    error = (sae(z) - z).pow(2).sum((0, 2))
    assert line["MSE"] == pytest.approx((error.sum() / len(z)).item(), rel=1e-3)
    assert line["FVU"] == pytest.approx((error.sum() / (z - z.mean(0)).pow(2).sum()).item(), rel=1e-3)
    assert line["L0"] == pytest.approx((sae.encode(z) > 0).float().sum((1, 2)).mean().item(), rel=1e-2)


def test_an_interrupted_run_resumes_to_the_same_weights(command, monkeypatch):
    arguments, out = command
    assert main([*arguments, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main([*arguments, "--name=halves"]) == 130
    assert checkpoint.load_config(out / "halves")["status"] == "training"
    assert checkpoint.load(out / "halves")[0], "an interrupted run can be looked at"
    assert main([*arguments, "--name=halves", "--resume=true"]) == 0
    whole, halves = (load_file(out / name / "sae.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
    steps = [[line["step"] for line in checkpoint.load_metrics(out / name)] for name in ("whole", "halves")]
    assert steps[0] == steps[1]


def test_a_run_that_was_saved_earlier_than_the_others_catches_up(command, monkeypatch):
    arguments, out = command
    both = [*arguments, "--l1_coefficients=[1,8]"]
    assert main([*both, "--name=whole"]) == 0
    with interrupted_at(7, monkeypatch):
        assert main([*both, "--name=halves"]) == 130
    shutil.rmtree(out / "halves-l1_1" / "training_state")  # as if killed between the two saves
    assert main([*both, "--name=halves", "--resume=true"]) == 0
    for coefficient in (1, 8):
        whole, halves = (
            load_file(out / f"{name}-l1_{coefficient}" / "sae.safetensors") for name in ("whole", "halves")
        )
        assert all(torch.equal(whole[key], halves[key]) for key in whole)


def test_dense_is_a_block_over_all_heads(command):
    arguments, out = command
    assert main([*arguments, "--block=dense"]) == 0
    sae, config = checkpoint.load(out / "run")
    assert (sae.n_heads, sae.d_head, config["block"]) == (1, 32, "dense")
    figures = checkpoint.load_eval(out / "run")
    assert len(figures["L0_per_head"]) == 1 and len(figures["FVU_per_head"]) == 4


def test_wandb_writes_an_offline_run(command):
    arguments, out = command
    assert main([*arguments[:-4], "--wandb=offline", "--name=logged"]) == 0
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
        (["--l1_coefficients=[]"], "at least one coefficient"),
        (["--dataset=nowhere.txt"], "nowhere.txt does not exist"),
        (["--context_size=5000"], "exceeds the 256 positions"),
        (["--batch_size=0"], "batch_size must be at least 1"),
        (["--buffer_tokens=10"], "must hold at least one batch"),
        (["--device=gpu"], "device 'gpu' cannot be used"),
        (["--out=/proc/nowhere"], "cannot be written to /proc/nowhere"),
        (["--eval_tokens=100000000"], "lower eval_tokens"),
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
    monkeypatch.setattr(Run, "update", lambda self, z: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(arguments) == 130
    assert main([*arguments, "--resume=true", "--lr=0.5"]) == 2
    assert "was begun with lr=" in capsys.readouterr().err


def test_an_interrupted_harvest_says_that_it_is_kept(command, capsys, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.lm.LanguageModel.hook_z", stop)
    assert main(command[0]) == 130
    assert "Activations harvested" in capsys.readouterr().err


def test_an_interrupted_evaluation_needs_no_training_again(command, monkeypatch):
    arguments, out = command

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.train.evaluate", stop)
        assert main(arguments) == 130
    monkeypatch.setattr(Run, "update", lambda self, z: pytest.fail("a step was trained again"))
    assert main([*arguments, "--resume=true"]) == 0
    assert checkpoint.load_eval(out / "run")["n_tokens"] >= 200
    assert not (out / "run" / "training_state").exists()


def test_a_full_disk_loses_nothing(command, capsys, monkeypatch):
    """The state saved at step 5 survives a disk that is full at step 10."""
    arguments, out = command
    original = Run.save

    def full(self, status):
        if self.step > 5:
            raise OSError(28, "No space left on device")
        original(self, status)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", full)
        assert main(arguments) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main([*arguments, "--resume=true"]) == 0
    steps = [line["step"] for line in checkpoint.load_metrics(out / "run")]
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
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "checkpoints").iterdir()
    sae, config = checkpoint.load(path)
    assert path.name == "gpt2-small-L4-april-x32-l1_2"
    assert config["model"]["hook_name"] == "blocks.4.attn.hook_z"
    assert (sae.n_heads, sae.d_head, sae.features_per_head) == (4, 8, 32 * 8), "sizes come from the model"
    assert config["training"]["lr"] == 5e-5 and config["l1_coefficient"] == 2
    assert checkpoint.load_eval(path)["n_tokens"] >= 200


def test_the_reference_flags_parse_to_the_reference_run(capsys):
    with pytest.raises(SystemExit):
        main([*REFERENCE, "--model=gpt2-small", "--print_config"])
    printed = capsys.readouterr().out
    for line in ("model: gpt2-small", "hook_layer: 4", "expansion_factor: 32", "total_training_steps: 50000"):
        assert line in printed
    assert "batch_size: 4096" in printed and "recipe: april" in printed


def test_a_terminated_process_saves_its_state(tmp_path, gpt2_folder, text_file):
    environment = {**os.environ, "ATTN_SAES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable, "-m", "trainer", f"--model={gpt2_folder}", f"--dataset={text_file}", "--hook_layer=1",
        "--total_training_steps=1000000", "--batch_size=64", "--buffer_tokens=1024", "--context_size=32",
        "--eval_tokens=100", "--log_every=1", "--wandb=disabled", "--name=long", "--expansion_factor=4",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "checkpoints" / "long" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size > 1000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume=true goes on" in error
    assert (tmp_path / "checkpoints" / "long" / "training_state" / "state.safetensors").exists()
    config = json.loads((tmp_path / "checkpoints" / "long" / "config.json").read_text())
    assert config["status"] == "training" and config["steps"] > 0
    shutil.rmtree(tmp_path / "checkpoints")
