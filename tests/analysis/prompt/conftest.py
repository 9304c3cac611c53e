"""The small models and SAEs that every question about a prompt is asked of."""

import pytest
import torch

from trainer.block_diag import BlockDiagSAE


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def lm(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["block", "dense", "topk"])
def sae(request, lm):
    torch.manual_seed(0)
    if request.param == "dense":
        sae = BlockDiagSAE(1, lm.n_heads * lm.d_head, 20)
    else:
        sae = BlockDiagSAE(lm.n_heads, lm.d_head, 5, *(("topk", 6, "layer") if request.param == "topk" else ()))
    sae.b_dec.data.normal_()
    return sae.requires_grad_(False)
