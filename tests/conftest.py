"""Fixtures that several test files share: small models, texts and trained checkpoints; nothing is downloaded."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Every shape annotation of these packages is checked while the tests run: before anything of them is imported.
install_import_hook(["trainer", "analysis"], "tests.check")

from tests.browser import Visitor, browse, serve
from tests.helpers import ANALYSED, OTHERS, save_tiny_gemma2, save_tiny_gpt2, save_tiny_llama, tiny_run, write_text


def pytest_addoption(parser) -> None:
    parser.addoption("--reliability", help="run the fault trials in full and write their table into this page")


@pytest.fixture
def float64() -> Iterator[None]:
    """So that no selection hangs on how a sum is rounded."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    save_tiny_gpt2(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")  # the word in the path is what TransformerLens trips over
    save_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def gpt2(gpt2_folder):
    from trainer.model.lm import LanguageModel

    return LanguageModel.load(str(gpt2_folder))


@pytest.fixture(scope="session")
def llama(llama_folder):
    from trainer.model.lm import LanguageModel

    return LanguageModel.load(str(llama_folder))


@pytest.fixture(scope="session")
def gemma2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("postnormed")
    save_tiny_gemma2(folder)
    return folder


@pytest.fixture(scope="session")
def gemma2(gemma2_folder):
    from trainer.model.lm import LanguageModel

    return LanguageModel.load(str(gemma2_folder))


@pytest.fixture(scope="session")
def trained(tmp_path_factory, gpt2_folder, text_file):
    """Two block-diagonal checkpoints, a dense one, and one of each other activation on the tiny GPT-2."""
    from trainer.__main__ import main

    folder = tmp_path_factory.mktemp("trained")
    more = ("--total_training_steps=20", "--batch_size=128", "--lr=1e-3", "--log_every=5")
    arguments = tiny_run(gpt2_folder, text_file, folder, *more)
    os.environ["ATTN_SAES_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    try:
        for l1 in (1, 4):
            assert main([*arguments, f"--l1_coefficients={l1}", f"--name=block-l1_{l1}"]) == 0
        assert main([*arguments, "--block=dense", "--l1_coefficients=2", "--name=dense"]) == 0
        for recipe, sparsity in OTHERS.items():
            assert main([*arguments, f"--recipe={recipe}", sparsity, f"--name={recipe}"]) == 0
    finally:
        del os.environ["ATTN_SAES_CACHE"]
    return folder


@pytest.fixture(scope="session")
def analysed(trained, tmp_path_factory):
    """Three analysed checkpoints and one without."""
    from analysis.__main__ import main

    folder = tmp_path_factory.mktemp("with-analysis")
    for name in (*ANALYSED, "topk"):
        shutil.copytree(trained / name, folder / name)
    paths = [str(folder / name) for name in ANALYSED]
    assert main([*paths, "--tokens=900", "--examples=4", "--quantile_examples=3", "--device=cpu"]) == 0
    return folder


@pytest.fixture(scope="session")
def layers_folder(tmp_path_factory, gpt2_folder, text_file):
    """A set on three of six layers of the tiny GPT-2, one of them analysed, and the heads of all layers."""
    from analysis.__main__ import main as analyse
    from analysis.heads.__main__ import main as describe
    from trainer.__main__ import main

    out = tmp_path_factory.mktemp("model")
    more = ("--total_training_steps=4", "--batch_size=64", "--cache_gb=0", "--name=tiny", "--hook_layer=0-2", "--k=5")
    assert main(tiny_run(gpt2_folder, text_file, out, *more)) == 0
    sizes = ("--tokens=300", "--repeated_tokens=300", "--removal_tokens=90", "--context_size=32")
    assert describe([str(gpt2_folder), f"--dataset={text_file}", f"--out={out}", *sizes, "--device=cpu"]) == 0
    assert analyse([str(out / "tiny-L1-batchtopk-x4-k5"), "--tokens=300", "--examples=2", "--device=cpu"]) == 0
    return out


@pytest.fixture
def show_copy(tmp_path, monkeypatch):
    """Copies a folder of checkpoints, so that a test may change it, and points the app at the copy."""

    def show(checkpoints: Path) -> Path:
        copy = tmp_path / "checkpoints"
        shutil.copytree(checkpoints, copy)
        monkeypatch.setenv("ATTN_SAES_CHECKPOINTS", str(copy))
        return copy

    return show


@pytest.fixture
def folder(trained, show_copy):
    return show_copy(trained)


@pytest.fixture(scope="module")
def chromium():
    with browse() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("app") / "log") as address:
        yield address


@pytest.fixture
def visitor(chromium, address):
    fresh = Visitor(chromium, address)
    yield fresh
    fresh.leave()
