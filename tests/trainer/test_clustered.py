"""Ratios of sums over contexts and their clustered errors."""

import math

import pytest
import torch

from trainer.clustered import ratio


def test_against_the_formula_written_out():
    torch.manual_seed(0)
    n, d = torch.randn(3, 7), torch.rand(7) + 0.5
    value, se = ratio(n, d)
    assert value.dtype == se.dtype == torch.float64
    for row in range(3):
        r = sum(n[row].tolist()) / sum(d.tolist())
        squares = sum((a - r * b) ** 2 for a, b in zip(n[row].tolist(), d.tolist(), strict=True))
        assert value[row].item() == pytest.approx(r, rel=1e-6)
        assert se[row].item() == pytest.approx(math.sqrt(7 / 6 * squares) / sum(d.tolist()), rel=1e-6)


def test_close_to_the_jackknife_over_contexts():
    torch.manual_seed(1)
    d = torch.rand(60) + 1
    n = 0.3 * d + 0.1 * torch.randn(60)
    _, se = ratio(n, d)
    left_out = torch.stack([(n.sum() - n[c]) / (d.sum() - d[c]) for c in range(60)])
    jackknife = (59 / 60 * (left_out - left_out.mean()).pow(2).sum()).sqrt()
    assert se.item() == pytest.approx(jackknife.item(), rel=0.05)


def test_larger_than_by_token_where_contexts_differ():
    torch.manual_seed(2)
    of_context = torch.randn(30, 1)
    for spread, low, high in ((1.0, 3.0, 11.0), (0.0, 0.6, 1.5)):
        tokens = spread * of_context + torch.randn(30, 100)
        _, se = ratio(tokens.sum(1), torch.tensor([100.0]))
        by_token = tokens.std() / 3000**0.5
        assert low < se / by_token < high


def test_of_one_context_there_is_no_error():
    value, se = ratio(torch.tensor([[2.0], [3.0]]), torch.tensor([4.0]))
    assert value.tolist() == [0.5, 0.75]
    assert se.isnan().all()
