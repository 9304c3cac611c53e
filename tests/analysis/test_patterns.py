"""Matrices of what every destination reads, against the sum over features one at a time."""

import pytest
import torch

from analysis.prompt.patterns import ACTIVE, ATTENTION, FEATURE, matrices
from analysis.prompt.run import run_prompt, source_attribution
from trainer.checkpoint import Checkpoint


@pytest.mark.parametrize("name", ["block-l1_1", "dense"])
def test_matrices_are_the_attribution_of_each_feature(trained, gpt2, name):
    checkpoint = Checkpoint(trained / name)
    run = run_prompt(gpt2.layer(checkpoint.layer), checkpoint.sae, "the head reads the token the head")
    assert torch.equal(matrices(run, ATTENTION), run.pattern)
    positive = torch.zeros_like(run.pattern)
    for q, block, index in (run.f > 0).nonzero().tolist():
        rows = source_attribution(run, block, index, q)
        for head, of_head in rows.groupby("head"):
            dfa = torch.tensor(of_head["dfa"].to_numpy())
            positive[head, q, : q + 1] += dfa.relu()
            found = matrices(run, FEATURE, (block, index))[head, q]
            torch.testing.assert_close(found[: q + 1], dfa)
            assert not found[q + 1 :].any()
    torch.testing.assert_close(matrices(run, ACTIVE), positive)
    assert positive.any()
    with pytest.raises(ValueError, match="choose a feature first"):
        matrices(run, FEATURE)
