"""Blocks side by side, on one thread each."""

import pytest
import torch

from tests.trainer.optimise.test_stack import SPARSITIES, build, config, data
from trainer.kernels import workers


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_each_is_done_on_one_thread_and_all_in_order(two_threads):
    assert workers.each(lambda i: (i, torch.get_num_threads()), range(7)) == [(i, 1) for i in range(7)]
    assert workers.each(lambda i: (i, torch.get_num_threads()), range(1)) == [(0, 2)], "nothing else wants a thread"
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError):
        workers.each(lambda i: 1 // i, range(2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("scope", ["layer", "head"])
@pytest.mark.parametrize("recipe", list(SPARSITIES))
def test_the_number_of_threads_changes_no_step(recipe, scope, float64):
    """Also of the sparse path of L1 recipes."""
    rows, after = data(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            stack = build([config(recipe, each, k_scope=scope) for each in SPARSITIES[recipe]], rows)
            for z in rows[: 20 * 64].split(64):
                stack.active_share.fill_(0.0 if stack.step > 10 else 1.0)
                stack.update(z)
            after.append({**stack.params, "threshold": stack.threshold, "unfired": stack.unfired})
    finally:
        torch.set_num_threads(1)
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, msg=lambda m, name=name: f"{name}: {m}")
