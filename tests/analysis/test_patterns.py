"""Matrices of what every destination reads, against the sum over features one at a time."""

import numpy as np
import pytest
import torch

from analysis.prompt.patterns import ACTIVE, ATTENTION, FEATURE, drawn, matrices
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


def test_a_picture_shows_the_largest_of_what_falls_together():
    """In size: one that is negative stays so. Small ones share a scale, the one shown has its own."""
    two = torch.zeros(2, 200, 200)
    two[0, 199, 0], two[0, 198, 1], two[1, 150, 3] = 1.0, -2.0, 0.5
    found = drawn(two, 1)
    first, second = (np.frombuffer(picture.values, np.int8).reshape(64, 64) for picture in found.small)
    assert (first[63, 0], second.max(), found.largest) == (-127, 32, 0.5)
    assert np.frombuffer(found.matrix, np.int8).reshape(200, 200)[150, 3] == 127
    assert found.large.size == 200 and drawn(two, None).largest == 1.0
