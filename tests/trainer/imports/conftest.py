"""SAEs as other programs save them, for layer 1 of the tiny GPT-2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import unfolded_z
from trainer.saelens import main

D_IN, D_SAE, HOOK = 32, 20, "blocks.1.attn.hook_z"


def random_weights(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: 0.4 * torch.randn(shape) for name, shape in shapes.items()}


def dense_weights() -> dict[str, torch.Tensor]:
    return random_weights(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, D_IN), b_dec=(D_IN,))


def centred(p: dict[str, torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations, in lengths of decoder rows, and reconstruction of the SAE as papers write it."""
    x = z.flatten(-2)
    f = ((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).relu()
    return f * p["W_dec"].norm(dim=-1), (f @ p["W_dec"] + p["b_dec"]).view_as(z)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, str]]:
    """The import's exit status, and what it said on stderr."""

    def call(*arguments) -> tuple[int, str]:
        status = main(["import", *map(str, arguments), "--eval_tokens=60"])
        return status, capsys.readouterr().err

    return call


@pytest.fixture
def save_folder(gpt2_folder, text_file) -> Callable[..., Path]:
    """Writes cfg.json, of this model and text unless said otherwise, and the weights."""

    def write(folder: Path, cfg: dict, weights: dict[str, torch.Tensor]) -> Path:
        folder.mkdir(parents=True)
        of_here = {"d_in": D_IN, "d_sae": D_SAE, "model_name": str(gpt2_folder), "dataset_path": str(text_file)}
        (folder / "cfg.json").write_text(json.dumps(of_here | {"context_size": 16} | cfg))
        save_file({name: p.contiguous() for name, p in weights.items()}, folder / "sae_weights.safetensors")
        return folder

    return write


@pytest.fixture(scope="session")
def z_by_convention(gpt2, gpt2_folder) -> dict[bool, torch.Tensor]:
    """z of layer 1 on the same tokens: with value biases folded, as here, and not, as Hugging Face computes it."""
    tokens = gpt2.to_tokens("the head reads a token and writes it back again")
    found = {True: gpt2.layer(1).z(tokens), False: unfolded_z(gpt2_folder, 1, tokens)}
    assert (found[True] - found[False]).abs().min() > 1e-4
    return found
