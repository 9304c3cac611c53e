"""Scores of explanations against their definitions, one example after another."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from analysis.detection import detected

EXAMPLES = st.lists(
    st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 0.6, 1.0]), st.integers(0, 4)), min_size=2, max_size=20
)


def by_definition(examples) -> tuple[float, float]:
    firing = [score for fires, score, _ in examples if fires]
    others = [score for fires, score, _ in examples if not fires]
    told = sum(s > 0.5 for s in firing) / len(firing), sum(s <= 0.5 for s in others) / len(others)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in firing for b in others]
    return sum(told) / 2, sum(pairs) / len(pairs)


def of_both(examples) -> bool:
    return len({fires for fires, _, _ in examples}) == 2


@given(EXAMPLES)
def test_against_the_definitions(examples):
    assume(of_both(examples))
    found = detected(*(np.array(column) for column in zip(*examples, strict=True)))
    assert (found.accuracy, found.auroc) == pytest.approx(by_definition(examples))
    contexts = sorted({context for *_, context in examples})
    left = [[each for each in examples if each[2] != out] for out in contexts]
    if len(contexts) == 1 or not all(map(of_both, left)):
        assert np.isnan(found.accuracy_se) and np.isnan(found.auroc_se)
        return
    n = len(contexts)
    for se, values in zip(
        (found.accuracy_se, found.auroc_se), zip(*map(by_definition, left), strict=True), strict=True
    ):
        assert se == pytest.approx(((n - 1) / n * sum((v - np.mean(values)) ** 2 for v in values)) ** 0.5)


def test_chance_and_certainty():
    fires, context = np.arange(40) % 2 == 0, np.arange(40) // 4
    assert detected(fires, fires.astype(float), context) == (1, 0, 1, 0)
    assert detected(fires, np.zeros(40), context)[::2] == (0.5, 0.5)
    assert detected(fires, 1.0 - fires, context)[::2] == (0, 0)
    with pytest.raises(ValueError, match="fire and others"):
        detected(np.ones(3, bool), np.ones(3), np.arange(3))
