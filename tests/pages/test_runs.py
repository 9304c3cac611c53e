"""The Runs page: commands that really repeat and resume, states from the log's age, trainings in the background."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from analysis.runs import commands, progress
from analysis.runs.background import AT_ONCE, Processes, tail
from tests.helpers import OTHERS, PATIENCE, ROOT, edit_config, open_page, said, tiny_run
from trainer import cli
from trainer.__main__ import main
from trainer.checkpoint import Checkpoint, read_metrics
from trainer.config import ActivationsConfig, SAEConfig, TrainingConfig
from trainer.locks import holder_here, locked
from trainer.log import MetricsLog

PAGE = "pages/runs.py"
NAMES = ["block-l1_1", "block-l1_4", "dense", *OTHERS]


@pytest.fixture
def allowed(monkeypatch):
    """A server that was started with the flag."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--allow-training"])


def words(command: str) -> list[str]:
    """The arguments for the trainer of a command, as a shell passes them on."""
    before, arguments = shlex.split(command)[:3], shlex.split(command)[3:]
    assert before == ["python", "-m", "trainer"]
    return arguments


def understood(command: str) -> tuple[ActivationsConfig, list[SAEConfig], TrainingConfig]:
    """What the trainer makes of a command."""
    return cli.build(cli.parser().parse_args(words(command)).as_dict())


def shown(app, part: str) -> str:
    """The one command on the page that has this in it."""
    (command,) = [code.value for code in app.code if part in code.value]
    return command


def interrupt(path, step: int | None = 10) -> None:
    """Make a complete checkpoint look like one that was interrupted."""
    edit_config(path, status="training", steps=step or 0)
    (path / "eval.json").unlink()
    lines = [json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= (step or 5)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if step:
        (path / "training_state").mkdir()
        (path / "training_state" / f"step-{step:07d}.safetensors").touch()


@pytest.mark.parametrize("name", NAMES)
def test_both_commands_mean_the_run_of_the_config(trained, name):
    path = trained / name
    checkpoint = Checkpoint(path)
    options = checkpoint.config.options
    again = commands.shell(commands.repeat(checkpoint, str(path), "a new 'name'"))
    assert understood(again) == (options.activations, [options.sae], replace(options.training, name="a new 'name'"))
    on = commands.shell(commands.resume(checkpoint, str(path)))
    assert understood(on) == (options.activations, [options.sae], replace(options.training, name=name, resume=True))


def test_a_run_without_its_options_has_no_command(folder):
    (folder / "topk" / "run.yaml").unlink()  # as before schema 3
    edit_config(folder / "gated", options=None, imported={"source": "SAELens topk", "recipe": "topk", "k": 9})
    for name, why in (("topk", "it has no run.yaml"), ("gated", "it was imported from SAELens topk")):
        app = open_page(PAGE, run=name)
        assert not app.exception and f"No command: {why}" in said(app)
        assert not [code for code in app.code if "--config" in code.value]


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_the_command_to_repeat_trains_the_same_weights(folder, tmp_path, monkeypatch, name):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    command = shown(open_page(PAGE, run=name), f"{name}-again")
    assert main(words(command)) == 0
    for file in ("sae.safetensors", "eval.json"):
        assert (folder / f"{name}-again" / file).read_bytes() == (folder / name / file).read_bytes()
    assert f"{name}-again-2" in "".join(code.value for code in open_page(PAGE, run=name).code)


def test_the_command_to_resume_ends_at_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        write = MetricsLog.write
        patch.setattr(MetricsLog, "write", lambda *line: (os.kill(os.getpid(), signal.SIGINT), write(*line)))
        assert main([f"--config={folder / 'batchtopk' / 'run.yaml'}", f"--out={folder}", "--name=halves"]) == 130
    path = folder / "halves"
    assert 0 < progress.saved_step(path) < 20 and not Checkpoint(path).is_complete
    command = shown(open_page(PAGE, run="halves"), "--resume=true")
    assert main(words(command)) == 0
    for file in ("sae.safetensors", "eval.json"):
        assert (path / file).read_bytes() == (folder / "batchtopk" / file).read_bytes()


def test_states_from_the_last_line(folder):
    def state(age, step=10, speed=100.0, name="topk", **config):
        edit_config(folder / name, **{"status": "training", **config})
        checkpoint = Checkpoint(folder / name)
        if (options := checkpoint.config.options) is not None:
            training = replace(options.training, log_every=10, batch_size=100, total_training_steps=20)
            checkpoint.config = replace(checkpoint.config, options=replace(options, training=training))
        line = {"step": step, "tokens_per_second": speed} if step else {}
        return progress._state(checkpoint, line, age)

    assert state(59) == "training" and state(61) == "stopped"  # a line every 10 s
    assert state(499, speed=10.0) == "training" and state(501, speed=10.0) == "stopped"  # every 100 s
    assert state(299, step=None) == "training" and state(301, step=None) == "stopped"
    assert state(3599, step=20) == "evaluating" and state(3601, step=20) == "stopped"
    with locked([folder / "topk"]):
        assert state(9999) == "training" and state(9999, step=20) == "evaluating"
        with pytest.raises(ValueError, match="topk is being trained already"):
            Processes().start([], ["topk"], folder, ROOT)
    assert state(1e9, status="complete") == "complete"
    imported = {"source": "SAELens topk", "recipe": "SAELens topk"}
    assert state(1e9, status="complete", options=None, imported=imported) == "imported"


def test_progress_of_a_live_and_of_a_killed_run(folder):
    interrupt(folder / "topk")
    os.utime(folder / "topk" / "metrics.jsonl", (time.time() + 7200,) * 2)  # live, however slowly the pages open
    interrupt(folder / "gated", step=None)
    os.utime(folder / "gated" / "metrics.jsonl", (time.time() - 7200,) * 2)
    table = open_page(PAGE).dataframe[0].value.set_index("name")
    assert table.index[0] == "gated" and table.index[1] == "topk", "what is not complete comes first"
    assert table.loc["topk", ["state", "step", "steps", "done"]].tolist() == ["training", 10, 20, 0.5]
    assert table.loc["gated", ["state", "step", "last_line"]].tolist() == ["stopped", 5, "2 h"]
    line = read_metrics(folder / "topk")[-1]
    for key in ("tokens_per_second", "L0", "FVU", "loss"):
        assert table.loc["topk", key] == pytest.approx(line[key])
    assert (table.drop(["topk", "gated"])["state"] == "complete").all()
    app = open_page(PAGE, run="topk")
    assert "from step 10, its last save: only once it has stopped" in said(app)
    path = folder / "topk"
    assert shown(app, "--resume=true") == (
        f"python -m trainer --config={path / 'run.yaml'} --out={folder} --name=topk --resume=true"
    )
    assert "from the beginning, because it has not saved yet" in said(open_page(PAGE, run="gated"))
    assert not [code for code in open_page(PAGE, run="dense").code if "--resume" in code.value]


def test_odd_checkpoints_leave_the_page(folder):
    (folder / "gated" / "metrics.jsonl").write_text("nonsense\n")
    (folder / "bricken" / "config.json").write_text("{")
    imported = {"source": "SAELens topk", "recipe": "SAELens topk", "k": 9}
    edit_config(folder / "topk", options=None, imported=imported, steps=None, tokens_seen=None)
    (folder / "topk" / "metrics.jsonl").unlink()
    app = open_page(PAGE, run="topk")
    assert not app.exception and not app.error
    states = app.dataframe[0].value.set_index("name")["state"]
    assert (states["topk"], states["gated"], "bricken" in states) == ("imported", "damaged log", False)
    assert "imported from SAELens topk" in said(app) and "Nothing is logged yet" in said(app)
    app = open_page(PAGE, run="gated")
    assert not app.exception and "metrics.jsonl is damaged" in app.error[0].value


def test_an_empty_folder_has_the_form(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(tmp_path / "none"))
    app = open_page(PAGE)
    assert not app.exception and "Train one" in said(app)
    assert app.text_input(key="k") and not (tmp_path / "none").exists()


def test_wandb_is_one_click_away(folder):
    assert not open_page(PAGE, run="topk").get("link_button")
    for url, n in (("https://wandb.ai/someone/attn-saes/runs/abc12345", 1), ("javascript:alert(1)", 0)):
        edit_config(folder / "topk", wandb_url=url)
        links = open_page(PAGE, run="topk").get("link_button")
        assert [link.proto.url for link in links] == [url] * n


def test_an_offline_run_of_wandb_is_found(folder):
    """In folders as the pinned W&B names them."""
    import wandb

    wandb_id = Checkpoint(folder / "topk").config.wandb_id
    assert len(wandb_id) == 8
    quiet = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="attn-saes", id=wandb_id, dir=folder / "topk", mode="offline", settings=quiet)
    assert run.url is None
    run.finish()
    assert len(progress.unsent(folder / "topk")) == 1
    app = open_page(PAGE, run="topk")
    assert any(code.value.startswith("wandb sync ") for code in app.code)


def test_the_form_composes_what_the_trainer_understands(folder):
    app = open_page(PAGE, model="gpt2", recipe="topk", k="8, 16", expansion_factor="4", block="dense", lr="0.0005")
    assert not app.exception and not app.error
    command = app.code[-1].value
    assert "--k=[8,16]" in shlex.split(command)
    activations, saes, training = understood(command)
    assert activations == ActivationsConfig(model="gpt2") and training == TrainingConfig(out=str(folder))
    assert [(sae.recipe, sae.k, sae.block, sae.expansion_factor, sae.lr) for sae in saes] == [
        ("topk", 8, "dense", 4, 5e-4), ("topk", 16, "dense", 4, 5e-4)]  # fmt: skip
    assert "gpt2-L17-topk-dense-x4-k8, gpt2-L17-topk-dense-x4-k16" in said(app)
    app.text_input(key="name").set_value("mine").run()
    assert understood(app.code[-1].value)[2].name == "mine" and "mine-L17-topk-dense-x4-k8" in said(app)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"k": "eight"}, "k must be whole numbers separated by commas, got 'eight'"),
        ({"recipe": "april", "k": "8"}, "april has no k: its sparsity is l1_coefficients"),
        ({"k": "0"}, "k must be at least 1, got 0"),
        ({"batch_size": "0"}, "batch_size must be at least 1, got 0"),
        ({"context_size": "2"}, "context_size must be at least 4, got 2"),
        ({"l1_coefficients": "nan"}, "must be finite"),
        ({"name": "../elsewhere"}, "cannot be part of a checkpoint's name"),
        ({"name": ".hidden"}, "cannot be part of a checkpoint's name"),
        ({"name": "topk"}, "topk exists already: choose another name"),
        ({"name": "null"}, "cannot be said on a command line"),
        ({"k": "8, 8"}, "the sweep names the same SAE twice"),
    ],
)
def test_what_the_dataclasses_refuse_is_their_sentence(folder, allowed, query, sentence):
    app = open_page(PAGE, **query)
    assert not app.exception
    assert sentence in app.error[0].value
    assert "train" not in [button.key for button in app.button], "what is refused cannot be started"


def test_without_the_flag_there_is_no_button(folder):
    app = open_page(PAGE)
    assert "train" not in [button.key for button in app.button]
    assert "--allow-training" in said(app)


def test_a_name_with_markup_is_only_text(folder):
    name = "<b>x</b> **y** `z` $(touch a)"  # a slash cannot be part of a name
    shutil.move(folder / "topk", folder / name.replace("/", "∕"))
    app = open_page(PAGE, run=name.replace("/", "∕"))
    assert not app.exception
    assert not [m for m in app.markdown if m.allow_html or "**y**" in m.value]
    assert "'--name=<b>x<∕b> **y** `z` $(touch a)-again'" in "".join(code.value for code in app.code)


def wait_for(condition, seconds: float = PATIENCE):
    end = time.time() + seconds
    while not (result := condition()):
        assert time.time() < end, "it took too long"
        time.sleep(0.2)
    return result


def test_a_training_runs_in_the_background_and_is_cancelled(
    folder, allowed, tmp_path, monkeypatch, gpt2_folder, text_file
):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    query = {"model": str(gpt2_folder), "dataset": str(text_file), "hook_layer": "1", "k": "9", "name": "behind",
             "expansion_factor": "4", "total_training_steps": "100000000", "batch_size": "128", "context_size": "32",
             "distinct_tokens": "4000", "eval_tokens": "200", "wandb": "disabled", "device": "cpu"}  # fmt: skip
    app = open_page(PAGE, **query)
    app.button(key="train").click().run()
    assert not app.exception and not app.error
    assert "behind: running" in said(app)
    assert os.getpgid(pid(app)) == pid(app), "a session of its own"
    try:
        wait_for(lambda: (folder / "behind" / "metrics.jsonl").exists() and read_metrics(folder / "behind"))
        again = AppTest.from_file(str(ROOT / "app.py"), default_timeout=PATIENCE).run()  # another session, another page
        again.switch_page(PAGE).run()
        assert "behind: running" in said(again)
        assert "Training:" in again.code[-1].value, "the progress bar is in the log's tail"
        assert again.dataframe[0].value.set_index("name").loc["behind", "state"] == "training"
        again.button(key="cancel behind").click().run()
        wait_for(lambda: "behind: stopped" in said(again.run()))
    finally:
        if "behind: running" in said(app.run()):
            os.kill(pid(app), signal.SIGKILL)
    assert progress.saved_step(folder / "behind") > 0 and not Checkpoint(folder / "behind").is_complete
    assert "the same command with --resume=true goes on" in tail(folder / ".runs" / "behind.log")
    os.utime(folder / "behind" / "metrics.jsonl", (time.time() - 7200,) * 2)
    app = open_page(PAGE, run="behind")
    assert "resume_run" in [button.key for button in app.button]


def pid(app) -> int:
    return int(said(app).split("process ")[-1].split()[0])


def test_nothing_is_trained_twice_at_once_and_failures_are_told(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").write_text(f"import sys, time; print(sys.argv[1:]); time.sleep({PATIENCE})")
    processes = Processes()
    first = processes.start(["--name=a b; touch x"], ["one", "two"], tmp_path, tmp_path)
    with pytest.raises(ValueError, match="two is being trained already"):
        processes.start([], ["two"], tmp_path, tmp_path)
    wait_for(lambda: "touch x" in tail(first.log))
    assert not (tmp_path / "x").exists()
    first.cancel()
    wait_for(lambda: first.state == "stopped")
    (tmp_path / "trainer" / "__main__.py").write_text("raise SystemExit(2)")
    second = processes.start([], ["two"], tmp_path, tmp_path)
    wait_for(lambda: second.state == "failed with status 2")
    assert [process.names for process in processes.all(tmp_path)] == [["two"], ["one", "two"]]
    second.cancel()  # has ended: nothing happens


SERVER = """
import json, sys, time
from pathlib import Path
from analysis.runs.background import Processes
processes = Processes()
for name, arguments in json.load(sys.stdin).items():
    processes.start(arguments, [name], Path(sys.argv[1]), Path())
print("started", flush=True)
time.sleep(int(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_restarted_server_knows_what_runs_and_what_has_ended(tmp_path, monkeypatch, gpt2_folder, text_file):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "checkpoints"
    out.mkdir()
    steps = {"long": 10**8, "short": 20, "refused": -1}
    more = ("--batch_size=128", "--distinct_tokens=4000")
    runs = {
        name: tiny_run(gpt2_folder, text_file, out, *more, f"--name={name}", f"--total_training_steps={n}")
        for name, n in steps.items()
    }

    def serve(*names: str) -> None:
        """A server that starts these and is killed at once."""
        command = [sys.executable, "-c", SERVER, str(out), str(PATIENCE)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as server:
            print(json.dumps({name: runs[name] for name in names}), file=server.stdin)
            server.stdin.close()
            assert server.stdout.readline() == "started\n"
            server.kill()

    restarted = Processes()
    of = lambda name: next(process for process in restarted.all(out) if process.names == [name])  # noqa: E731
    serve("short", "refused")
    wait_for(lambda: "total_training_steps" in tail(of("refused").log))
    wait_for(lambda: "KL score" in tail(of("short").log) and of("short").state != "running")
    assert of("short").state == "complete" and of("short").pid is None
    assert of("refused").state == "ended"
    serve("long")
    wait_for(lambda: (out / "long").exists() and read_metrics(out / "long"))
    long = restarted.all(out)[0]
    try:
        assert (long.names, long.state, long.popen) == (["long"], "running", None)
        assert "Training:" in tail(long.log)
        with pytest.raises(ValueError, match="long is being trained already"):
            restarted.start([], ["long"], out, ROOT)
        monkeypatch.setattr("analysis.runs.background.AT_ONCE", 1)
        with pytest.raises(ValueError, match=r"at once are the limit \(long\)"):
            restarted.start([], ["more"], out, ROOT)
        long.cancel()
        wait_for(lambda: long.state == "ended")
    finally:
        if long.pid:
            os.kill(long.pid, signal.SIGKILL)
    assert long.pid is None and progress.saved_step(out / "long") > 0
    assert "the same command with --resume=true goes on" in tail(long.log)
    long.cancel()  # nobody is killed by the number that a process had


def test_a_lock_of_another_machine_names_no_process_here(tmp_path):
    with locked([tmp_path / "run"]):
        assert holder_here(tmp_path / "run") == os.getpid()
        (tmp_path / ".runs" / "run.lock").write_text("by process 1 on elsewhere since 2026-01-01 00:00:00")
        assert holder_here(tmp_path / "run") is None
    assert holder_here(tmp_path / "run") is None


def test_the_tail_of_a_log_is_what_one_would_see(tmp_path):
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_bytes(b"Loading\n  0%|\r 50%|\r100%|\n\x1b[31merror\x1b[0m\r\n\xff" + b"\n")
    assert tail(log) == "Loading\n100%|\nerror\n\ufffd"
    log.write_text("".join(f"{i}\n" for i in range(9999)))
    assert tail(log, 2) == "9997\n9998"


def test_only_so_many_trainings_run_at_once(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__main__.py").write_text(f"import time; time.sleep({PATIENCE})")
    processes = Processes()
    try:
        for n in range(AT_ONCE):
            processes.start([], [f"run{n}"], tmp_path, tmp_path)
        with pytest.raises(ValueError, match="trainings at once are the limit"):
            processes.start([], ["more"], tmp_path, tmp_path)
        assert len(processes.all(tmp_path)) == AT_ONCE
    finally:
        for process in processes.all(tmp_path):
            process.popen.kill()
            process.popen.wait()
    processes.start([], ["more"], tmp_path, tmp_path).popen.kill()
