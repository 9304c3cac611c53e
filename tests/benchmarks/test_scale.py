"""The model of what a large run costs: its operations are those that torch counts, its errors those that docs quote."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import scale
from tests.helpers import ROOT
from trainer.block_diag import BlockDiagSAE
from trainer.model.lm import LanguageModel

RATES = scale.measured((ROOT / "benchmarks" / "README.md").read_text())


@pytest.mark.parametrize(("folder", "matrices"), [("gpt2_folder", 2), ("llama_folder", 3)])
def test_the_models_operations_are_those_that_torch_counts(folder, matrices, request):
    lm = LanguageModel.load(str(request.getfixturevalue(folder)))
    cfg, tokens = lm.model.cfg, torch.ones(2, 16, dtype=torch.int64)
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    shape = scale.Model(
        "tiny", lm.n_layers, cfg.d_model, lm.n_heads, kv_heads, lm.d_head, cfg.d_mlp, matrices, tokens.shape[1]
    )
    with FlopCounterMode(display=False) as counter:
        lm.z_of(tokens, [1])
    assert sum(shape.forward(1)) * tokens.numel() == counter.get_total_flops()


def test_parameters_are_those_of_an_sae():
    shape = scale.Model("small", 1, 0, 3, 3, 8, 0, 2, 16)
    sae = BlockDiagSAE(3, 8, 8 * scale.EXPANSION)
    assert shape.sae_parameters == sum(parameter.numel() for parameter in sae.parameters())
    assert shape.d_sae == sae.d_sae


@pytest.mark.parametrize("recipe", list(scale.RECIPES))
def test_rows_that_were_not_fitted_are_met(recipe):
    rows = scale.held_out(RATES, recipe)
    assert len(rows) >= 2
    for name, found, said in rows:
        assert 0 < said / found - 1 < 0.07, name  # docs/scale.md: 2 to 6 % too fast


def test_what_is_shared_is_computed_once_and_messages_cost():
    fit = scale.fitted(RATES, "batchtopk")
    one, many = (scale.cost(scale.GPT2, fit, n) for n in (1, 64))
    assert one.gradients == one.rows == 0 and many.forward == one.forward and many.gradients > many.saes > one.saes
    jobs = scale.split(scale.GPT2, fit, 64, 8)
    assert jobs.forward == pytest.approx(8 * one.forward) and jobs.gradients < many.gradients
