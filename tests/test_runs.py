"""The Runs page: commands that really repeat and resume, states from the log's age, trainings in the background."""

import json
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields, replace

import pytest
from conftest import OTHERS, PATIENCE, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest
from test_pages import open_page, said

from analysis import commands, runs
from analysis.background import Processes, tail
from trainer import checkpoint
from trainer.__main__ import build_parser, main
from trainer.config import ActivationsConfig, TrainingConfig
from trainer.recipes import SAEConfig, SweepConfig

PAGE = "pages/runs.py"
NAMES = ["block-l1_1", "block-l1_4", "dense", *OTHERS]


@pytest.fixture
def allowed(monkeypatch):
    """A server that was started with the flag."""
    monkeypatch.setattr(sys, "argv", ["app.py", "--allow-training"])


def understood(command: str) -> tuple[ActivationsConfig, list[SAEConfig], TrainingConfig]:
    """What the trainer makes of a command as a shell passes it on."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "trainer"]
    options = build_parser().parse_args(words[3:]).as_dict()
    activations, sweep, training = (
        group(**{each.name: options[each.name] for each in fields(group)})
        for group in (ActivationsConfig, SweepConfig, TrainingConfig)
    )
    return activations, sweep.expand({each.name: options.get(each.name) for each in fields(SAEConfig)}), training


def stored(config: dict) -> tuple[ActivationsConfig, list[SAEConfig], TrainingConfig]:
    pick = lambda group: group(**{each.name: config["training"][each.name] for each in fields(group)})  # noqa: E731
    return pick(ActivationsConfig), [pick(SAEConfig)], pick(TrainingConfig)


def of_config(activations: ActivationsConfig, sae: SAEConfig, training: TrainingConfig) -> dict:
    return {"training": {**asdict(activations), **asdict(sae), **asdict(training)}}


def interrupt(path, step: int | None = 10) -> dict:
    """Make a complete checkpoint look like one that was interrupted."""
    config = {**checkpoint.load_config(path), "status": "training", "steps": step or 0}
    checkpoint.write_json(path / "config.json", config)
    (path / "eval.json").unlink()
    lines = [json.dumps(line) + "\n" for line in checkpoint.load_metrics(path) if line["step"] <= (step or 5)]
    (path / "metrics.jsonl").write_text("".join(lines))
    if step:
        (path / "training_state").mkdir()
        (path / "training_state" / f"step-{step:07d}.safetensors").touch()
    return config


@pytest.mark.parametrize("name", [*NAMES, *sorted(path.name for path in (ROOT / "checkpoints").iterdir())])
def test_both_commands_mean_the_run_of_the_config(trained, name):
    config = checkpoint.load_config((trained if name in NAMES else ROOT / "checkpoints") / name)
    activations, saes, training = stored(config)
    again = commands.shell(commands.repeat(config, "a new 'name'", "checkpoints"))
    named = replace(training, name="a new 'name'", out="checkpoints", resume=False)
    assert understood(again) == (activations, saes, named)
    on = commands.shell(commands.resume(config, name, "/some where/else"))
    named = replace(training, name=name, out="/some where/else", resume=True)
    assert understood(on) == (activations, saes, named)


def test_a_command_names_only_what_differs_from_the_defaults():
    config = checkpoint.load_config(ROOT / "checkpoints" / "smollm2-135m-L17-reference-lr1e-3-x8-l1_3")
    assert commands.shell(commands.repeat(config, "again", "checkpoints")) == (
        "python -m trainer --preset=reference --label=reference-lr1e-3 --l1_coefficients=3 --expansion_factor=8 "
        "--lr=0.001 --total_training_steps=1500 --batch_size=2048 --eval_tokens=4096 --dead_after_tokens=200000 "
        "--weights_dtype=float16 --wandb=disabled --name=again"
    )


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_commands_of_any_options(data):
    """Only what differs is written, and nothing is lost, whatever was changed."""
    draw = data.draw
    maybe = lambda strategy: draw(st.none() | strategy)  # noqa: E731
    preset = maybe(st.sampled_from(["reference", "kissane"]))
    recipe = draw(st.sampled_from(["april", "bricken", "gated", "jumprelu", "topk", "batchtopk"]))
    given_ = {"preset": preset, "recipe": recipe, "hook_layer": draw(st.integers(0, 40)),
              "block": maybe(st.sampled_from(["head", "dense"])), "lr": maybe(st.floats(1e-9, 1)),
              "normalize": maybe(st.sampled_from(["none", "global"])), "beta2": maybe(st.sampled_from([0, 0.9])),
              "label": maybe(st.text("ab $'\"\\\t;|é", min_size=1)),
              "expansion_factor": maybe(st.integers(1, 64))}  # fmt: skip
    sparsity = {"k": maybe(st.integers(1, 99))} if "topk" in recipe else {"l1_coefficient": maybe(st.floats(0, 1e9))}
    sae = SAEConfig.resolve(**given_, **sparsity)
    activations = ActivationsConfig(model=draw(st.sampled_from(["gpt2", "/a b/c", "$(touch x)"])),
                                    cache_gb=draw(st.sampled_from([16.0, 0.0, 2.5])))  # fmt: skip
    training = TrainingConfig(seed=draw(st.integers(0, 9)), keep_training_state=draw(st.booleans()),
                              wandb=maybe(st.sampled_from(["offline", "disabled"])))  # fmt: skip
    try:
        command = commands.shell(commands.repeat(of_config(activations, sae, training), "n", "checkpoints"))
    except ValueError as error:  # YAML takes some texts for something else; then it says so
        if "label" in str(error):
            return
        raise
    assert understood(command) == (activations, [sae], replace(training, name="n"))


def test_what_a_command_line_cannot_say_is_refused(trained):
    config = checkpoint.load_config(trained / "topk")
    with pytest.raises(ValueError, match="name 'null' cannot be said on a command line"):
        commands.resume(config, "null", "checkpoints")
    with pytest.raises(ValueError, match="imported from SAELens topk"):
        commands.repeat({**config, "imported_from": "SAELens topk"}, "name", "checkpoints")
    odd = {**config, "training": {**config["training"], "k": 0}}
    with pytest.raises(ValueError, match="k must be at least 1"):
        commands.repeat(odd, "name", "checkpoints")


def test_the_command_to_repeat_trains_the_same_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "cache"))
    app = open_page(PAGE, run="topk")
    (command,) = [each.value for each in app.code if "topk-again" in each.value]
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[3:]) == 0
    for file in ("sae.safetensors", "eval.json"):
        assert (folder / "topk-again" / file).read_bytes() == (folder / "topk" / file).read_bytes()
    assert "topk-again-2" in "".join(each.value for each in open_page(PAGE, run="topk").code)


def test_states_from_the_last_line():
    def state(age, step=10, speed=100.0, **config):
        training = {"log_every": 10, "batch_size": 100, "total_training_steps": 20}
        line = {"step": step, "tokens_per_second": speed} if step else {}
        return runs._state({"status": "training", "training": training, **config}, line, age)

    assert state(59) == "training" and state(61) == "stopped"  # a line every 10 s
    assert state(499, speed=10.0) == "training" and state(501, speed=10.0) == "stopped"  # every 100 s
    assert state(299, step=None) == "training" and state(301, step=None) == "stopped"
    assert state(3599, step=20) == "evaluating" and state(3601, step=20) == "stopped"
    assert state(1e9, status="complete") == "complete"
    assert state(1e9, status="complete", imported_from="SAELens topk") == "imported"


def test_progress_of_a_live_and_of_a_killed_run(folder):
    interrupt(folder / "topk")
    os.utime(folder / "topk" / "metrics.jsonl", (time.time() + 7200,) * 2)  # live, however slowly the pages open
    interrupt(folder / "gated", step=None)
    os.utime(folder / "gated" / "metrics.jsonl", (time.time() - 7200,) * 2)
    shown = open_page(PAGE).dataframe[0].value.set_index("name")
    assert shown.index[0] == "gated" and shown.index[1] == "topk", "what is not complete comes first"
    assert shown.loc["topk", ["state", "step", "steps", "done"]].tolist() == ["training", 10, 20, 0.5]
    assert shown.loc["gated", ["state", "step", "last_line"]].tolist() == ["stopped", 5, "2 h"]
    line = checkpoint.load_metrics(folder / "topk")[-1]
    for key in ("tokens_per_second", "L0", "FVU", "loss"):
        assert shown.loc["topk", key] == pytest.approx(line[key])
    assert (shown.drop(["topk", "gated"])["state"] == "complete").all()
    app = open_page(PAGE, run="topk")
    assert "from step 10, its last save: only once it has stopped" in said(app)
    (command,) = [each.value for each in app.code if "--resume=true" in each.value]
    activations, saes, training = stored(checkpoint.load_config(folder / "topk"))
    assert understood(command) == (activations, saes, replace(training, name="topk", out=str(folder), resume=True))
    assert "from the beginning, because it has not saved yet" in said(open_page(PAGE, run="gated"))
    assert not [each for each in open_page(PAGE, run="dense").code if "--resume" in each.value]


def test_odd_checkpoints_leave_the_page(folder):
    (folder / "gated" / "metrics.jsonl").write_text("nonsense\n")
    (folder / "bricken" / "config.json").write_text("{")
    config = checkpoint.load_config(folder / "topk")
    kept = ("model", "dataset", "hook_layer", "k", "recipe", "block", "preset", "seed", "eval_tokens")
    more = {"training": {key: config["training"][key] for key in kept}, "imported_from": "SAELens topk"}
    checkpoint.write_json(folder / "topk" / "config.json", {**config, **more, "steps": None, "tokens_seen": None})
    (folder / "topk" / "metrics.jsonl").unlink()
    app = open_page(PAGE, run="topk")
    assert not app.exception and not app.error
    shown = app.dataframe[0].value.set_index("name")["state"]
    assert (shown["topk"], shown["gated"], "bricken" in shown) == ("imported", "damaged log", False)
    assert "imported from SAELens topk" in said(app) and "Nothing is logged yet" in said(app)
    app = open_page(PAGE, run="gated")
    assert not app.exception and "metrics.jsonl is damaged" in app.error[0].value


def test_an_empty_folder_has_the_form(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(tmp_path / "none"))
    app = open_page(PAGE)
    assert not app.exception and "Train one" in said(app)
    assert app.text_input(key="k") and not (tmp_path / "none").exists()


def test_wandb_is_one_click_away(folder):
    file = folder / "topk" / "config.json"
    config = json.loads(file.read_text())
    assert not open_page(PAGE, run="topk").get("link_button")
    for url, n in (("https://wandb.ai/someone/attn-saes/runs/abc12345", 1), ("javascript:alert(1)", 0)):
        file.write_text(json.dumps({**config, "wandb_url": url}))
        links = open_page(PAGE, run="topk").get("link_button")
        assert [each.proto.url for each in links] == [url] * n


def test_an_offline_run_of_wandb_is_found(folder):
    """In folders as the pinned W&B names them."""
    import wandb

    config = checkpoint.load_config(folder / "topk")
    assert len(config["wandb_id"]) == 8
    quiet = wandb.Settings(silent=True, console="off")
    run = wandb.init(project="attn-saes", id=config["wandb_id"], dir=folder / "topk", mode="offline", settings=quiet)
    assert run.url is None
    run.finish()
    assert len(runs.unsent(folder / "topk")) == 1
    app = open_page(PAGE, run="topk")
    assert any(each.value.startswith("wandb sync ") for each in app.code)


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
    assert "'--name=<b>x<∕b> **y** `z` $(touch a)-again'" in "".join(each.value for each in app.code)


def wait_for(condition, seconds: float = PATIENCE):
    end = time.time() + seconds
    while not (found := condition()):
        assert time.time() < end, "it took too long"
        time.sleep(0.2)
    return found


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
        wait_for(lambda: (folder / "behind" / "metrics.jsonl").exists() and checkpoint.load_metrics(folder / "behind"))
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
    assert runs.saved_step(folder / "behind") > 0 and checkpoint.load_config(folder / "behind")["status"] == "training"
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
    processes.cancel("one")
    processes.cancel("unknown")
    wait_for(lambda: first.state == "stopped")
    (tmp_path / "trainer" / "__main__.py").write_text("raise SystemExit(2)")
    second = processes.start([], ["two"], tmp_path, tmp_path)
    wait_for(lambda: second.state == "failed with status 2")
    assert [each.names for each in processes.all()] == [["two"], ["one", "two"]]


def test_the_tail_of_a_log_is_what_one_would_see(tmp_path):
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_bytes(b"Loading\n  0%|\r 50%|\r100%|\n\x1b[31merror\x1b[0m\r\n\xff" + b"\n")
    assert tail(log) == "Loading\n100%|\nerror\n\ufffd"
    log.write_text("".join(f"{i}\n" for i in range(9999)))
    assert tail(log, 2) == "9997\n9998"
