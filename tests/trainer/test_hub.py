"""Pushing and pulling, against a stand-in of the hub on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import streamlit as st
import torch
import yaml

from analysis.__main__ import main as analyse
from analysis.export_csv import main as export_csv
from tests.helpers import PAGES, ROOT, edit_json, open_page
from tests.hub import READ_ONLY, Hub, serve_hub
from trainer.checkpoint import Checkpoint, list_checkpoints
from trainer.evaluate import main as evaluate
from trainer.hub import main
from trainer.saelens import main as saelens
from trainer.sharing.pull import located
from trainer.sharing.push import without_places

FILES = {"config.json", "run.yaml", "sae.safetensors", "eval.json", "metrics.jsonl"}
FOR_SAELENS = {"cfg.json", "sae_weights.safetensors"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub(monkeypatch, str(tmp_path / "cache")) as hub:
        yield hub


@pytest.fixture
def away(monkeypatch, tmp_path) -> Path:
    """Another machine, as it were: an empty folder that is the current one."""
    folder = tmp_path / "away"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capfd):
    """A command line; returns the exit status and what it said: on stdout, and on stderr without progress bars."""

    def call(*arguments, command=main) -> tuple[int, str, str]:
        status = command([str(argument) for argument in arguments])
        said = capfd.readouterr()
        bars = re.compile(r"\x1b\[A|[^\r\n]*?\d%\|[^\r\n]*?\][ ]*")  # an error may follow one on its line
        return status, said.out, "\n".join(line for line in bars.sub("", said.err).splitlines() if line.strip())

    return call


@pytest.fixture
def refused(run):
    """Sees that a command says one sentence; returns it."""

    def call(*arguments, command=main) -> str:
        status, _, said = run(*arguments, command=command)
        assert status == 2
        assert said.startswith("error: ") and said.count("\n") == 0, said
        return said

    return call


@pytest.fixture
def of_others(hub, trained):
    """A repository with one checkpoint, whose files a test may change."""

    def add(name: str = "sae", repo: str = "other/heads") -> dict[str, bytes]:
        files = {f"{name}/{each}": (trained / "batchtopk" / each).read_bytes() for each in FILES}
        return hub.add(repo, files).files

    return add


def files_of(hub: Hub, name: str, repo: str = "me/heads") -> dict[str, bytes]:
    files = hub.repos[repo].files
    return {path.removeprefix(f"{name}/"): data for path, data in files.items() if path.startswith(f"{name}/")}


def cells(card: str, row: str, after: str = "") -> list[str]:
    """The cells of the first line of a card's tables, below a text, that begins with this one."""
    lines = card[card.index(after) :].splitlines()
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_what_is_pulled_is_what_was_pushed(hub, trained, away, run):
    status, said, error = run("push", trained / "block-l1_1", "me/heads")
    assert status == 0, error
    assert f"/me/heads/commit/{hub.repos['me/heads'].head}" in said
    assert "block-l1_1: 0 MB of weights, 0 MB for SAELens" in said
    assert set(files_of(hub, "block-l1_1")) == FILES | FOR_SAELENS
    assert run("pull", "me/heads/block-l1_1")[0] == 0

    ours, back = Checkpoint(trained / "block-l1_1"), Checkpoint(away / "checkpoints" / "block-l1_1")
    assert {path.name for path in back.path.iterdir()} == FILES
    assert not any(path.is_symlink() for path in back.path.rglob("*"))
    assert back.weights_hash == ours.weights_hash
    assert back.eval == ours.eval and back.metrics() == ours.metrics()
    for name in ("sae.safetensors", "eval.json", "metrics.jsonl"):
        assert (back.path / name).read_bytes() == (ours.path / name).read_bytes()
    model, text = back.config.model, back.config.text
    assert (model.fingerprint, model.processing) == (ours.config.model.fingerprint, ours.config.model.processing)
    assert (model.name, text.name) == (Path(ours.config.model.name).name, "text.jsonl")
    assert text.fingerprint == ours.config.text.fingerprint
    assert back.config.sae == ours.config.sae and back.config.options.sae == ours.config.options.sae
    assert [path.name for path in away.iterdir()] == ["checkpoints"]
    # The same again is no error, and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in back.path.iterdir()}
    status, said, _ = run("pull", "me/heads/block-l1_1")
    assert status == 0 and "is here already, with the same weights" in said
    assert {path: path.stat().st_mtime_ns for path in back.path.iterdir()} == before


def test_a_shipped_checkpoint_comes_back_to_the_byte(hub, away, run):
    """It names no places, so nothing of it is changed but where it was trained to."""
    shipped = ROOT / "checkpoints" / "smollm2-135m-L17-topk-x8-k4"
    assert run("push", shipped, "me/heads")[0] == 0
    found = files_of(hub, shipped.name)
    for name in FILES:
        assert found[name] == (shipped / name).read_bytes(), name


def test_no_file_names_a_place_of_this_machine(hub, analysed, run, gpt2_folder, text_file):
    for each in ("block-l1_1", "dense"):
        config = (analysed / each / "config.json").read_text()
        assert str(gpt2_folder) in config and str(text_file) in config
    status, said, _ = run("push", analysed / "block-l1_1", analysed / "dense", "me/heads", "--with_analysis")
    assert status == 0
    assert f"its model lies here only, so others read {gpt2_folder.name} and name its place with --model" in said
    assert f"its text lies here only, so others read {text_file.name} and name its place with --text" in said
    places = [
        os.fsencode(place) for place in (gpt2_folder, text_file, gpt2_folder.parent, text_file.parent, Path.cwd())
    ]
    files = hub.repos["me/heads"].files
    assert any(path.endswith("analysis/features.parquet") for path in files)
    for path, data in files.items():
        assert not [place for place in places if place in data], path
        assert not re.search(rb'["\' ](/|~)\w+/', data) or not path.endswith((".json", ".yaml", ".md")), path
    options = yaml.safe_load(files_of(hub, "dense")["run.yaml"])
    assert (options["out"], options["dataset"]) == ("checkpoints", text_file.name)
    config = json.loads(files_of(hub, "dense")["config.json"])
    assert config["options"]["training"]["out"] == "checkpoints"


def test_places_are_all_that_changes():
    left = {"a": "openai-community/gpt2", "b": ["x.jsonl", 1.5, None, True], "c": "https://wandb.ai/a/b", "d": "1/2"}
    assert without_places(left) == left
    places = {
        "/home/me/gpt2/": "gpt2",
        "~/x.txt": "x.txt",
        "file:///a/b.gz": "b.gz",
        "C:\\me\\c": "c",
        "/a/*.md": "*.md",
    }
    assert without_places(list(places)) == list(places.values())


def test_a_pulled_set_opens_in_every_page(hub, analysed, away, run, monkeypatch, gpt2_folder):
    names = ["block-l1_1", "dense", "batchtopk"]
    assert run("push", *(analysed / name for name in names), "me/heads", "--with_analysis")[0] == 0
    assert hub.repos["me/heads"].messages[1:] == ["Push block-l1_1, dense, batchtopk"]
    status, said, _ = run("pull", "me/heads", "--out", away / "pulled")
    assert status == 0
    assert said.split() == [str(away / "pulled" / name) for name in sorted(names)]
    readable, errors = list_checkpoints(away / "pulled")
    assert [each.name for each in readable] == sorted(names) and not errors
    for each in readable:
        assert each.weights_hash == Checkpoint(analysed / each.name).weights_hash
        for table in (analysed / each.name / "analysis").glob("*.parquet"):
            assert (each.path / "analysis" / table.name).read_bytes() == table.read_bytes()
    monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(away / "pulled"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for page in PAGES:
        app = open_page(page, checkpoint="dense", sae="dense", run="dense", a="dense", b="batchtopk")
        if page == "pages/prompt.py":  # the model was a folder elsewhere
            (place,) = [field for field in app.text_input if field.label == "Where the language model lies now"]
            app = place.set_value(str(gpt2_folder)).run()
        assert not app.exception and not app.error, page
        for box in [box for box in app.selectbox if box.key in ("checkpoint", "sae", "run", "a")]:
            assert box.value == "dense" and set(names) <= set(box.options)
    st.cache_resource.clear()


def test_a_set_of_two_layers(hub, trained, away, run, tmp_path):
    from sae_lens import SAE

    shutil.copytree(trained / "block-l1_1", tmp_path / "layer-2")
    model = json.loads((tmp_path / "layer-2" / "config.json").read_text())["model"]
    other = {"hook_layer": 2, "hook_name": "blocks.2.attn.hook_z"}
    edit_json(tmp_path / "layer-2" / "config.json", model=model | other)
    assert run("push", trained / "block-l1_1", tmp_path / "layer-2", "me/heads")[0] == 0
    card = hub.repos["me/heads"].files["README.md"].decode()
    for name, layer in (("block-l1_1", 1), ("layer-2", 2)):
        assert cells(card, f"`{name}`")[0] == str(layer)
        assert cells(card, f"`{name}`", "## What they read")[2] == f"`blocks.{layer}.attn.hook_z`"
        theirs = SAE.from_pretrained(release="me/heads", sae_id=name)
        assert theirs.cfg.metadata.hook_name == f"blocks.{layer}.attn.hook_z"
    assert run("pull", "me/heads")[0] == 0
    readable, errors = list_checkpoints(away / "checkpoints")
    assert [(each.name, each.layer) for each in readable] == [("block-l1_1", 1), ("layer-2", 2)] and not errors


def test_an_evaluation_of_an_address_is_written_beside_the_weights(hub, trained, away, run, gpt2_folder, text_file):
    assert run("push", trained / "batchtopk", "me/heads")[0] == 0
    hf = "hf://me/heads/batchtopk"
    status, _, said = run(hf, "--device=cpu", f"--model={gpt2_folder}", f"--text={text_file}", command=evaluate)
    assert status == 0, said
    pulled = Checkpoint(away / "checkpoints" / "batchtopk")
    ours = Checkpoint(trained / "batchtopk").eval
    assert pulled.eval["L0"] == pytest.approx(ours["L0"]) and pulled.eval["FVU"] == pytest.approx(ours["FVU"])


def test_saelens_loads_it_by_name(hub, trained, run, gpt2):
    from sae_lens import SAE

    assert run("push", trained / "block-l1_1", trained / "dense", "me/heads")[0] == 0
    z = gpt2.layer(1).z(torch.randint(1, 257, (2, 16)))
    for name in ("block-l1_1", "dense"):
        with pytest.warns(UserWarning, match="fold_value_biases|model_from_pretrained_kwargs"):
            theirs = SAE.from_pretrained(release="me/heads", sae_id=name)
        ours = Checkpoint(trained / name).sae
        f = ours.encode(z).flatten(-2)
        assert 0.01 < (f > 0).float().mean() < 0.99
        torch.testing.assert_close(theirs.encode(z), f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs(z), ours(z), rtol=1e-4, atol=1e-5)
        assert theirs.cfg.metadata.hook_name == "blocks.1.attn.hook_z"
        assert not os.path.isabs(theirs.cfg.metadata.model_name)


def test_what_saelens_cannot_express_is_pushed_without(hub, trained, away, run, tmp_path):
    shutil.copytree(trained / "topk", tmp_path / "by-head")
    config = json.loads((tmp_path / "by-head" / "config.json").read_text())
    edit_json(tmp_path / "by-head" / "config.json", sae=config["sae"] | {"k_scope": "head", "k": 2})
    status, said, _ = run("push", tmp_path / "by-head", "me/heads")
    assert status == 0 and "so it is not for SAELens" in said
    assert set(files_of(hub, "by-head")) == FILES
    card = hub.repos["me/heads"].files["README.md"].decode()
    assert "Not for SAELens, which has no topk with k features of each head: `by-head`." in card
    assert "from_pretrained(" not in card
    assert run("pull", "me/heads")[0] == 0


def test_the_card_has_the_figures_of_every_head(hub, trained, run):
    names = ["batchtopk", "block-l1_1", "dense"]
    assert run("push", *(trained / name for name in names), "me/heads", "--license=mit")[0] == 0
    card = hub.repos["me/heads"].files["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "saelens" and front["license"] == "mit"
    assert "sparse-autoencoder" in front["tags"]
    for name in names:
        saved = Checkpoint(trained / name)
        figures = saved.eval

        def score(figures, key: str, how: str = ".3f") -> str:
            if figures[key] is None:
                return "not measurable"
            return f"{figures[key]:{how}}" + (f" ± {figures[f'{key}_se']:{how}}" if f"{key}_se" in figures else "")

        row = cells(card, f"`{name}`")
        assert row[:5] == ["1", f"`{saved.recipe}`", f"`{saved.sparsity}`", f"{saved.config.sae.d_sae:,}",
                           f"{saved.config.tokens_seen:,}"]  # fmt: skip
        assert row[5:9] == [
            score(figures, "L0", ".1f"),
            *(score(figures, key) for key in ("FVU", "CE_score", "KL_score")),
        ]
        assert row[9:] == [score(figures["induction"], "L0", ".1f"), score(figures["induction"], "KL_score")]
        heads = f"\n`{name}`\n"
        assert cells(card, "head", heads) == ["0", "1", "2", "3"]
        assert cells(card, "FVU", heads) == with_errors(figures, "FVU_per_head", ".3f")
        for key, title in (("CE_score", "CE score"), ("KL_score", "KL score")):
            pairs = zip(figures[f"{key}_per_head"], figures[f"{key}_per_head_se"], strict=True)
            expected = ["not measurable" if value is None else f"{value:.3f} ± {se:.3f}" for value, se in pairs]
            assert cells(card, title, heads) == expected
        if not saved.is_dense:
            assert cells(card, "L0", heads) == with_errors(figures, "L0_per_head", ".1f")
    below = card[card.index("\n`dense`\n") :]
    assert "| L0 |" not in below  # features of a dense SAE belong to no head
    assert 'SAE.from_pretrained(release="me/heads", sae_id="batchtopk")' in card
    assert "python -m trainer.hub pull me/heads" in card and "hf://me/heads/batchtopk" in card


def with_errors(figures, key: str, how: str) -> list[str]:
    return [f"{value:{how}} ± {se:{how}}" for value, se in zip(figures[key], figures[f"{key}_se"], strict=True)]


def test_what_is_not_measurable_or_not_evaluated_is_said(hub, trained, run, tmp_path):
    shutil.copytree(trained / "batchtopk", tmp_path / "dim")
    figures = json.loads((tmp_path / "dim" / "eval.json").read_text())
    nothing = {"CE_score": None, "CE_score_se": None, "CE_score_per_head": [None, 0.25, -1.5, None],
               "CE_score_per_head_se": [None, 0.5, 0.125, None]}  # fmt: skip
    without = {key: value for key, value in figures.items() if not key.startswith("KL_score_per_head")}
    (tmp_path / "dim" / "eval.json").write_text(json.dumps(without | nothing))
    shutil.copytree(trained / "batchtopk", tmp_path / "blind")
    (tmp_path / "blind" / "eval.json").unlink()
    assert run("push", tmp_path / "dim", tmp_path / "blind", "me/heads")[0] == 0
    card = hub.repos["me/heads"].files["README.md"].decode()
    assert cells(card, "`dim`")[7] == "not measurable"
    assert cells(card, "CE score", "\n`dim`\n") == [
        "not measurable", "0.250 ± 0.500", "-1.500 ± 0.125", "not measurable"
    ]  # fmt: skip
    assert cells(card, "KL score", "\n`dim`\n") == ["not measured"] * 4
    assert cells(card, "`blind`")[5:] == ["not evaluated"] * 6
    assert "`blind`\n\nNot evaluated." in card


def test_texts_of_files_are_no_markdown(hub, trained, run, tmp_path):
    shutil.copytree(trained / "batchtopk", tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "config.json").read_text())
    evil = "<img src=x> | [a](http://b) `code` \n# title"
    config["options"]["sae"]["label"] = config["text"]["name"] = evil
    (tmp_path / "sae" / "config.json").write_text(json.dumps(config))
    assert run("push", tmp_path / "sae", "me/heads")[0] == 0
    card = hub.repos["me/heads"].files["README.md"].decode()
    shown = "``<img src=x> \\| [a](http://b) `code` # title``"
    assert card.count(shown) == 2 and card.count("<img") == 2
    assert "\n# title" not in card


def test_a_second_push_adds_to_the_set_and_keeps_what_people_wrote(hub, trained, away, run, refused):
    assert run("push", trained / "block-l1_1", "me/heads", "--license=mit")[0] == 0
    repo = hub.repos["me/heads"]
    written = repo.files["README.md"].decode() + "\nMy own words.\n"
    repo.commit(repo.files | {"README.md": written.encode(), "notes.txt": b"mine"})
    assert run("push", trained / "dense", "me/heads", "--message=more")[0] == 0
    card = repo.files["README.md"].decode()
    assert repo.messages[-1] == "more"
    assert card.count("My own words.") == 1 and card.rstrip().endswith("My own words.")
    assert "license: mit" in card
    figures = Checkpoint(trained / "block-l1_1").eval
    assert cells(card, "FVU", "\n`block-l1_1`\n") == with_errors(figures, "FVU_per_head", ".3f")
    assert cells(card, "`dense`")
    assert set(files_of(hub, "dense")) == set(files_of(hub, "block-l1_1")) == FILES | FOR_SAELENS
    assert repo.files["notes.txt"] == b"mine"

    head = repo.head
    assert "it has dense already: say --replace" in refused("push", trained / "dense", "me/heads")
    assert repo.head == head
    repo.commit(repo.files | {"dense/analysis/meta.json": b"of other weights"})
    assert run("push", trained / "dense", "me/heads", "--replace")[0] == 0
    assert "dense/analysis/meta.json" not in repo.files
    assert repo.files["README.md"].decode() == card
    assert run("pull", "me/heads")[0] == 0
    assert {path.name for path in (away / "checkpoints").iterdir()} == {"dense", "block-l1_1"}


def test_a_card_that_somebody_wrote_stays_below(hub, trained, run):
    hub.add("me/heads", {"README.md": b"---\nlicense: cc-by-4.0\n---\n# Ours\n\nBy hand.\n"})
    assert run("push", trained / "dense", "me/heads")[0] == 0
    card = hub.repos["me/heads"].files["README.md"].decode()
    assert "license: cc-by-4.0" in card.split("---\n")[1]
    assert card.endswith("\n# Ours\n\nBy hand.\n")


def test_private_stays_private(hub, trained, run, refused):
    assert run("push", trained / "dense", "me/secret", "--private")[0] == 0
    assert hub.repos["me/secret"].private
    assert run("push", trained / "dense", "me/open")[0] == 0
    assert not hub.repos["me/open"].private
    head = hub.repos["me/open"].head
    assert "everybody can see it" in refused("push", trained / "topk", "me/open", "--private")
    assert hub.repos["me/open"].head == head


def test_an_older_revision_can_be_pulled(hub, trained, away, run, refused):
    assert run("push", trained / "block-l1_1", "me/heads")[0] == 0
    first = hub.repos["me/heads"].head
    assert run("push", trained / "dense", "me/heads")[0] == 0
    assert run("pull", "me/heads", "--revision", first)[0] == 0
    assert [path.name for path in (away / "checkpoints").iterdir()] == ["block-l1_1"]
    assert "has no such revision" in refused("pull", "me/heads", "--revision=none")
    assert "it has no checkpoint dense, but block-l1_1" in refused(
        f"hf://me/heads/dense@{first}", "csv", command=export_csv
    )


def test_an_address_stands_for_a_checkpoint_in_every_command(hub, analysed, away, run, refused, tmp_path):
    assert run("push", analysed / "dense", analysed / "block-l1_1", "me/heads", "--with_analysis")[0] == 0
    assert run("hf://me/heads/dense", away / "csv", command=export_csv)[0] == 0
    assert (away / "csv" / "features.csv").exists()
    assert (away / "checkpoints" / "dense" / "config.json").exists()
    assert run("export", "hf://me/heads/block-l1_1", away / "theirs", command=saelens)[0] == 0
    assert {path.name for path in (away / "theirs").iterdir()} == FOR_SAELENS
    # Those that run a model stop at its place, which is not here; so they have read the checkpoint.
    from analysis.match.__main__ import main as match
    from analysis.sae_vis import main as sae_vis

    addresses = ["hf://me/heads/dense", "hf://me/heads/block-l1_1"]
    elsewhere = f"--model={away / 'moved'}"
    for command, arguments in (
        (analyse, [*addresses, elsewhere]),
        (evaluate, [*addresses, elsewhere]),
        (match, [*addresses, elsewhere]),
        (sae_vis, [addresses[0], away / "out.html", elsewhere]),
    ):
        assert "moved" in refused(*arguments, command=command)
    from analysis.explain import main as explain

    assert "name a --program" in refused(addresses[0], command=explain)
    assert "no address of a checkpoint" in refused("hf://me/heads", away / "csv", command=export_csv)


def test_nobody_waits_for_what_only_some_need():
    heavy = "{'transformer_lens', 'sae_lens', 'transformers', 'huggingface_hub'}"
    code = f"import sys, trainer.hub, trainer.sharing.push; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_several_processes_do_not_pull_one_thing(hub, of_others, away, monkeypatch):
    of_others()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"before them run `python -m trainer\.hub pull other/heads/sae`"):
        located("hf://other/heads/sae")
    assert hub.asked == []


def test_an_address_survives_pathlib(hub, of_others, away):
    of_others()
    assert located(Path("hf://other/heads/sae")) == Path("checkpoints/sae")
    assert located("some/folder") == located(Path("some/folder")) == Path("some/folder")


def test_without_network_the_cache_does(hub, trained, away, run, refused, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import reset_sessions

    assert run("push", trained / "dense", "me/heads")[0] == 0
    assert run("pull", "me/heads/dense")[0] == 0
    shutil.rmtree(away / "checkpoints")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    hub.asked.clear()
    assert run("pull", "me/heads/dense")[0] == 0
    assert (away / "checkpoints" / "dense").exists() and hub.asked == []
    assert "not in the cache and the Hugging Face hub cannot be reached" in refused("pull", "me/others")
    assert "the Hugging Face hub cannot be reached" in refused("push", trained / "dense", "me/others")
    # Online by its settings, but nobody answers.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    reset_sessions()
    assert "cannot be reached" in refused("pull", "me/others")
    assert "cannot be reached" in refused("push", trained / "dense", "me/others")


def test_other_weights_of_that_name_stay(hub, of_others, trained, away, refused):
    of_others("dense")
    shutil.copytree(trained / "dense", away / "checkpoints" / "dense")
    before = {path: path.read_bytes() for path in (away / "checkpoints").rglob("*") if path.is_file()}
    said = refused("pull", "other/heads")
    assert "checkpoints/dense exists already, with other weights than hf://other/heads/dense" in said
    assert {path: path.read_bytes() for path in (away / "checkpoints").rglob("*") if path.is_file()} == before
    shutil.rmtree(away / "checkpoints" / "dense")
    (away / "checkpoints" / "dense").mkdir()
    assert "exists already" in refused("pull", "other/heads")


def change(file: str, **changes):
    def spoil(files: dict[str, bytes]) -> None:
        files[file] = json.dumps(json.loads(files[file]) | changes).encode()

    return spoil


def huge(files: dict[str, bytes]) -> None:
    sae = json.loads(files["sae/config.json"])["sae"] | {"features_per_block": 10**11}
    change("sae/config.json", sae=sae)(files)


HOSTILE = {
    "truncated weights": (
        lambda files: files.update({"sae/sae.safetensors": files["sae/sae.safetensors"][:-9]}),
        "hf://other/heads/sae/sae.safetensors is damaged",
    ),
    "pickled weights": (
        lambda files: files.update({"sae/sae.safetensors": b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."}),
        "hf://other/heads/sae/sae.safetensors is damaged",
    ),
    "only pickles": (
        lambda files: files.update({"sae/sae.pt": files.pop("sae/sae.safetensors")}),
        "it has no checkpoint that `python -m trainer.hub push` made",
    ),
    "huge sizes": (huge, "hf://other/heads/sae/sae.safetensors holds"),
    "no description": (
        lambda files: files.update({"sae/config.json": b"[" * 100_000}),
        "hf://other/heads/sae/config.json is damaged",
    ),
    "no figures": (change("sae/eval.json", L0="many"), "hf://other/heads/sae/eval.json is damaged"),
    "no log": (
        lambda files: files.update({"sae/metrics.jsonl": b"{}\n"}),
        "hf://other/heads/sae/metrics.jsonl is damaged",
    ),
    "a name that leads out": (
        lambda files: files.update({f"../{key}": files.pop(key) for key in list(files)}),
        "it has no checkpoint",
    ),
    "a name of dots": (
        lambda files: files.update({f"..{key.removeprefix('sae')}": files.pop(key) for key in list(files)}),
        "it has no checkpoint",
    ),
    "for SAELens alone": (
        lambda files: (files.clear(), files.update({"layer_1/cfg.json": b"{}"})),
        "but other/heads:layer_1 for `python -m trainer.saelens import`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_checkpoint_is_refused_and_leaves_nothing(case, hub, of_others, away, refused, tmp_path):
    files = of_others()
    spoil, sentence = HOSTILE[case]
    spoil(files)
    assert sentence in refused("pull", "other/heads")
    assert not (away / "checkpoints").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"away", "cache"}
    assert list(away.iterdir()) == []


def test_one_bad_checkpoint_spoils_the_set(hub, of_others, trained, away, refused):
    files = of_others()
    files.update({f"good/{each}": (trained / "dense" / each).read_bytes() for each in FILES})
    files["sae/sae.safetensors"] = files["sae/sae.safetensors"][:-9]
    assert "hf://other/heads/sae/sae.safetensors is damaged" in refused("pull", "other/heads")
    assert list(away.iterdir()) == []


def test_only_files_of_a_checkpoint_are_taken(hub, of_others, away, run, tmp_path):
    files = of_others()
    foreign = ("../evil.txt", "sae/../../evil.txt", "sae/evil.pkl", "sae/labels.sqlite", "sae/analysis/../evil.json",
               "sae/analysis/evil.py", "sae/training_state/x.json", "sae\\..\\evil.txt", "/evil.txt", "evil.txt",
               "sae/sub/config.json", "sae/.hidden")  # fmt: skip
    files.update(dict.fromkeys(foreign, b"evil"))
    assert run("pull", "other/heads")[0] == 0
    assert {path.name for path in (away / "checkpoints" / "sae").iterdir()} == FILES
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
    fetched = {line.split("/", 5)[-1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {f"sae/{each}" for each in FILES}


def test_what_is_too_large_is_not_fetched(hub, of_others, away, refused):
    of_others()
    hub.sizes["sae/sae.safetensors"] = 10**18
    assert "of disk" in refused("pull", "other/heads")
    assert not [line for line in hub.asked if "/resolve/" in line]
    assert list(away.iterdir()) == []


def test_what_the_hub_does_not_allow_is_one_sentence(hub, trained, away, of_others, refused, monkeypatch):
    path = trained / "dense"
    of_others()
    assert "could not be pushed: other/new does not permit it to this token" in refused("push", path, "other/new")
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "me/heads does not permit it to this token" in refused("push", path, "me/heads")
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "the hub does not accept the token: log in with `hf auth login`" in refused("push", path, "me/heads")
    monkeypatch.delenv("HF_TOKEN")
    assert "nobody is logged in to the Hugging Face hub: run `hf auth login`" in refused("push", path, "me/heads")
    assert list(hub.repos) == ["other/heads"]
    assert "the Hugging Face hub has no repository me/none" in refused("pull", "me/none")
    hub.add("me/secret", {}, private=True)
    assert "only for those who log in" in refused("pull", "me/secret")
    assert "it has no checkpoint none, but sae" in refused("pull", "other/heads/none")
    assert "could not be pulled" in refused("pull", "other/--bad--")
    assert list(away.iterdir()) == []


def test_a_push_in_between_is_noticed(hub, trained, refused, monkeypatch):
    from trainer.sharing import push

    made = push.write_card

    def meanwhile(*arguments) -> str:
        hub.repos["me/heads"].commit({"other": b""})
        return made(*arguments)

    monkeypatch.setattr(push, "write_card", meanwhile)
    assert "me/heads was changed meanwhile: try again" in refused("push", trained / "dense", "me/heads")
    assert set(hub.repos["me/heads"].files) == {"other"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pull", "heads"], "heads is no OWNER/REPO or OWNER/REPO/NAME"),
        (["pull", "a/b/c/d"], "is no OWNER/REPO"),
        (["push", "{dense}", "heads"], "heads is no name of a repository"),
        (["push", "{dense}", "{dense}"], "is a folder here: name the repository last"),
        (["push", "{dense}", "{dense}", "me/heads"], "two of these checkpoints have the same name"),
        (["push", "{away}", "me/heads"], "config.json is missing"),
        (["push", "{dense}", "me/heads", "--with_analysis"], "has no analysis: leave out --with_analysis"),
        (["push", "{dense}", "me/heads", "--license=a: b"], "is no license that the hub knows"),
        (["push", "{away}/a name", "me/heads"], "the name a name cannot be shared"),
        (["push", "{away}/training", "me/heads"], "is still in training"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(arguments, sentence, hub, trained, away, refused):
    for name in ("a name", "training"):
        shutil.copytree(trained / "dense", away / name)
    edit_json(away / "training" / "config.json", status="training")
    places = {"dense": trained / "dense", "away": away}
    assert sentence in refused(*(argument.format(**places) for argument in arguments))
    assert hub.asked == []


def test_the_current_folder_has_a_name(hub, trained, run, monkeypatch):
    monkeypatch.chdir(trained / "dense")
    assert run("push", ".", "me/heads")[0] == 0
    assert set(files_of(hub, "dense")) == FILES | FOR_SAELENS
