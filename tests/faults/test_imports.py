"""Folders and files of others, damaged at random: one sentence, or an SAE that computes what the files say."""

import json
import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.trainer.imports.conftest import D_IN, D_SAE, HOOK, dense_weights
from trainer.imports.source import read

WRONG = [
    None,
    True,
    -1,
    0,
    1,
    7,
    10**12,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"k": []},
]
SAELENS = {
    "d_in": D_IN, "d_sae": D_SAE, "architecture": "topk", "k": 3, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "finetuning_scaling_factor": False, "rescale_acts_by_decoder_norm": False,
    "activation_fn": "relu", "activation_fn_kwargs": {},
    "metadata": {"hook_name": HOOK, "hook_head_index": None, "model_name": "gpt2", "dataset_path": "x",
                 "context_size": 16, "sae_lens_training_version": "6.1.0", "l1_coefficient": 2.0, "recipe": "topk",
                 "held_out_fraction": 0.1, "text_column": "text", "k": 3,
                 "model_from_pretrained_kwargs": {"center_writing_weights": False}},
}  # fmt: skip
FLAT = {key: value for key, value in SAELENS.items() if key != "metadata"} | SAELENS["metadata"]
KISSANE = {
    "act_name": HOOK,
    "act_size": D_IN,
    "dict_size": D_SAE,
    "model_name": "gpt2",
    "seq_len": 128,
    "l1_coeff": 1.0,
}
FORMATS = {"SAELens 6": SAELENS, "SAELens 3": FLAT, "Kissane et al.": KISSANE}


def write(folder: Path, kind: str) -> tuple[Path, Path]:
    """The configuration and the weights."""
    folder.mkdir()
    if kind == "Kissane et al.":
        config, weights = folder / "x_cfg.json", folder / "x.pt"
        torch.save(dense_weights(), weights)
    else:
        config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
        save_file(dense_weights(), weights)
    config.write_text(json.dumps(FORMATS[kind]))
    return config, weights


def outcome(folder: Path) -> bool:
    """Whether it was read, whole; else it was refused with one sentence. Anything else is raised."""
    sentence = ""
    try:
        found = read(str(folder))
        sae = found.for_raw_z(4, torch.full((D_IN,), 1.0 if found.scale is None else found.scale))
    except ValueError as error:
        sentence = str(error)
    if sentence:
        assert "\n" not in sentence
        assert len(sentence) < 500 + 3 * len(str(folder))
        return False
    assert found.W_enc.shape == (D_IN, D_SAE)
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    assert found.topk is None or 1 <= found.topk <= D_SAE
    return True


@pytest.mark.parametrize("kind", FORMATS)
def test_a_configuration_with_wrong_entries(kind, tmp_path, tries, fault):
    config, _ = write(tmp_path / "theirs", kind)
    chance, n = random.Random(1), tries(60, 2500)
    refused = 0
    for _ in range(n):
        entries = json.loads(json.dumps(FORMATS[kind]))
        for _ in range(chance.choice((1, 1, 2, 3))):
            place = (
                entries["metadata"] if isinstance(entries.get("metadata"), dict) and chance.random() < 0.6 else entries
            )
            key = chance.choice(sorted(place)) if place else "d_in"
            if chance.random() < 0.3:
                place.pop(key, None)
            else:
                place[key] = deepcopy(chance.choice(WRONG))
        config.write_text(json.dumps(entries))
        refused += not outcome(config.parent)
    assert 0 < refused < n
    fault("imports", f"{kind}: entries of the configuration missing or wrong", n,
          "one sentence, or what the rest says")  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file(kind, tmp_path, tries, fault):
    chance, n = random.Random(2), tries(30, 1500)
    refused = 0
    for index in range(n):
        file = chance.choice(write(tmp_path / str(index), kind))
        content = bytearray(file.read_bytes())
        if chance.random() < 0.5:
            del content[chance.randrange(len(content)) :]
        else:  # mostly in the header, where names and sizes are
            for _ in range(chance.choice((1, 4))):
                content[chance.randrange(min(len(content), chance.choice((64, 600, 10**6))))] = chance.randrange(256)
        file.write_bytes(content)
        refused += not outcome(file.parent)
    assert refused > n / 3
    fault(
        "imports", f"{kind}: a file cut off, or bytes of it changed", n, "one sentence, or finite weights of the sizes"
    )
