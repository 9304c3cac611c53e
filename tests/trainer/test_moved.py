"""Models and texts that lie elsewhere than in training: found again, named again, or refused in one sentence."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import sae_vis
from analysis.__main__ import main as analyse
from analysis.match.__main__ import main as match
from tests.helpers import edit_config, open_page, said, tiny_run
from trainer.__main__ import main as train
from trainer.checkpoint import Checkpoint
from trainer.data.text import Corpus
from trainer.evaluate import main as evaluate

SHORT = ("--total_training_steps=4", "--batch_size=64", "--l1_coefficients=1", "--save_every=2")


@pytest.fixture(scope="module")
def at_first(tmp_path_factory, gpt2_folder, text_file):
    """A folder with a model, a text, and two checkpoints trained from within it on relative paths; and its copy."""
    folder = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(gpt2_folder, folder / "m")
    shutil.copy(text_file, folder / "t.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ATTN_SAES_CACHE", str(folder.parent / "cache"))
        for name in ("a", "b"):
            assert train(tiny_run("./m", "./t.jsonl", "out", *SHORT, f"--name={name}", f"--seed={ord(name)}")) == 0
    return folder, shutil.copytree(folder, folder.parent / "copy")


@pytest.fixture
def project(at_first, tmp_path, monkeypatch):
    """That folder, as it was at first; the current one is another."""
    folder, copy = at_first
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    monkeypatch.setenv("ATTN_SAES_CACHE", str(folder.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    return folder


def move(project):
    """The model and the text to another place; returns the flags that name it."""
    (project / "m").rename(project / "moved")
    (project / "t.jsonl").rename(project / "moved.jsonl")
    return f"--model={project / 'moved'}", f"--text={project / 'moved.jsonl'}"


def commands(project, *flags):
    """Every command that opens what a checkpoint was trained on."""
    a, b = (str(project / "out" / name) for name in "ab")
    return {
        "evaluate": lambda: evaluate([a, b, "--tokens=100", *flags]),
        "analysis": lambda: analyse([a, b, "--tokens=200", "--examples=2", "--device=cpu", *flags]),
        "match": lambda: match([a, b, "--tokens=200", *flags]),
        "sae_vis": lambda: sae_vis.main(
            [a, str(project / "page.html"), "--tokens=400", "--features_per_head=1", *flags]
        ),
    }


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]


def test_relative_paths_are_found_from_another_folder(project):
    config = Checkpoint(project / "out" / "a").config
    assert (config.model.name, config.text.name) == (str(project / "m"), str(project / "t.jsonl"))
    assert evaluate([str(project / "out" / "a"), "--tokens=100"]) == 0
    again = ["--config", str(project / "out" / "a" / "run.yaml"), f"--out={project / 'out'}", "--name=again"]
    assert train(again) == 0
    ours, theirs = (Checkpoint(project / "out" / name) for name in ("a", "again"))
    assert ours.config.model == theirs.config.model and ours.config.text == theirs.config.text


def test_relative_paths_of_older_checkpoints_are_of_a_folder_above(project, capsys):
    path = project / "out" / "a"
    for model, text in (("./m", "t.jsonl"), ("../project/m", "./t.jsonl")):
        config = Checkpoint(path).config
        edit_config(path, model=vars(config.model) | {"name": model}, text=vars(config.text) | {"name": text})
        assert evaluate([str(path), "--tokens=100"]) == 0
        assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "analysis", "match", "sae_vis"])
def test_what_was_moved_is_named_again(name, project, capsys):
    before = (project / "out" / "a" / "config.json").read_bytes()
    model, text = move(project)
    assert commands(project)[name]() == 2
    (error,) = errors(capsys)
    assert str(project / "m") in error and "--model" in error
    assert commands(project, model)[name]() == 2
    (error,) = errors(capsys)
    assert str(project / "t.jsonl") in error and "--text" in error
    assert commands(project, model, text)[name]() == 0
    assert (project / "out" / "a" / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["evaluate", "analysis", "match", "sae_vis"])
def test_another_model_or_text_is_refused(name, project, capsys, llama_folder):
    model, text = move(project)
    other = project / "other"
    shutil.copytree(project / "moved", other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.h.0.attn.c_attn.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    lines = (project / "moved.jsonl").read_text().splitlines(keepends=True)
    (project / "other.jsonl").write_text("".join(lines[:-5]))
    for flags, says in (
        ((f"--model={other}", text), "has other weights than the model"),
        ((f"--model={llama_folder}", text), "6 heads"),
        ((f"--model={project / 'nowhere'}", text), "there is no model folder"),
        ((model, f"--text={project / 'other.jsonl'}"), "is another text"),
        ((model, f"--text={project / 'nowhere'}"), "there is no text file or folder"),
    ):
        assert commands(project, *flags)[name]() == 2
        (error,) = errors(capsys)
        assert says in error
    assert not list(project.glob("out/*/analysis")) and not list(project.glob("out/*/matches"))


def test_another_text_of_an_analysis_needs_not_the_one_trained_on(project, text_file, capsys):
    model, text = move(project)
    arguments = [str(project / "out" / "a"), "--tokens=200", "--examples=2", "--device=cpu", model]
    assert analyse([*arguments, f"--dataset={text_file}", text]) == 2
    assert "--dataset another text" in errors(capsys)[0]
    assert analyse([*arguments, f"--dataset={text_file}"]) == 0


def test_one_model_for_several_is_refused(project, capsys):
    path = project / "out" / "b"
    edit_config(path, model=vars(Checkpoint(path).config.model) | {"fingerprint": "0"})
    for name in ("evaluate", "analysis"):
        assert commands(project, f"--model={project / 'm'}")[name]() == 2
        assert "of several" in errors(capsys)[0]


@pytest.mark.parametrize("then", ["relative", "moved"])
def test_a_run_goes_on(then, project, monkeypatch):
    """One that an older version began, which stored a relative path as it was typed."""
    monkeypatch.chdir(project)
    arguments = tiny_run("./m", "./t.jsonl", "out", *SHORT, "--name=c")
    with monkeypatch.context() as patch:
        patch.setattr("trainer.train._loop", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train(arguments) == 130
    path = project / "out" / "c"
    config = Checkpoint(path).config
    edit_config(path, model=vars(config.model) | {"name": "./m"}, text=vars(config.text) | {"name": "./t.jsonl"})
    if then == "moved":
        model, text = move(project)
        arguments = [model if each == "--model=./m" else each for each in arguments]
        arguments = [text.replace("text", "dataset", 1) if each.startswith("--dataset") else each for each in arguments]
    assert train([*arguments, "--resume=true"]) == 0
    assert Checkpoint(path).config.model.name == str(project / ("moved" if then == "moved" else "m"))


def test_a_local_data_set_is_the_same_wherever_it_lies(tmp_path, monkeypatch, gpt2):
    import datasets

    rows = [{"text": f"the head reads {i} " * 40} for i in range(40)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    relative, absolute = (Corpus(name, gpt2.tokenizer, 32, 0.3) for name in ("./saved", str(tmp_path / "saved")))
    assert relative.name == absolute.name == str(tmp_path / "saved") and not relative.finite
    (tmp_path / "saved").rename(tmp_path / "moved")
    moved = Corpus("moved", gpt2.tokenizer, 32, 0.3)
    assert moved.fingerprint == relative.fingerprint == absolute.fingerprint
    assert torch.equal(moved.held_out(2), Corpus("./moved", gpt2.tokenizer, 32, 0.3).held_out(2))
    datasets.Dataset.from_list(rows[:30]).save_to_disk(tmp_path / "fewer")
    assert Corpus("fewer", gpt2.tokenizer, 32, 0.3).fingerprint != moved.fingerprint


def test_the_prompt_page_asks_where_the_model_lies(project, monkeypatch, llama_folder):
    from pages.shared import live

    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(project / "out"))
    model, _ = move(project)
    try:
        app = open_page("pages/prompt.py", checkpoint="a")
        assert "there is no model folder" in said(app)
        field = next(each for each in app.text_input if "lies now" in each.label)
        app = field.set_value(str(llama_folder)).run()
        assert "has other weights than the model" in said(app) and not app.exception
        field = next(each for each in app.text_input if "lies now" in each.label)
        app = field.set_value(model.removeprefix("--model=")).run()
        assert not app.error and not app.exception, said(app)
        assert not [each for each in app.text_input if "lies now" in each.label]
        app = open_page("pages/prompt.py", checkpoint="b")  # of the same model
        assert not app.error and not app.exception, said(app)
    finally:
        live._places.clear()
        live._language_model.clear()
