"""Rules say what descriptions say; examples are of further text; a planted rule is found, a planted liar is not."""

import numpy as np
import pandas as pd
import pytest
import torch

from analysis import attribution as dfa
from analysis.attribution import Reader
from analysis.corpus.descriptions import FurtherFirings, Rule, choose_detection, rules, score_descriptions
from analysis.corpus.passes import feed
from analysis.corpus.running_statistics import Largest
from trainer.block_diag import BlockDiagSAE

PREVIOUS, INDUCTION = dfa.SLOTS.index("previous"), dfa.SLOTS.index("induction")


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        (Rule(PREVIOUS, frozenset({5}), frozenset({7})), 1),
        (Rule(PREVIOUS, frozenset({5}), frozenset()), 1),
        (Rule(PREVIOUS, frozenset(), frozenset({8})), 0.5),
        (Rule(PREVIOUS, frozenset({7}), frozenset({7})), 0.5),
        (Rule(INDUCTION, frozenset(), frozenset({8})), 0.5),
        (Rule(INDUCTION, frozenset({3}), frozenset({7})), 0.5),
        (Rule(dfa.SLOTS.index("digit"), frozenset(), frozenset({8})), 0),
        (Rule(None, frozenset(), frozenset({7})), 1),
        (Rule(None, frozenset(), frozenset()), 1),
    ],
)
def test_a_rule_is_its_description(rule, score):
    """`7 6 5 7`: 6 stands after an earlier copy of the last token, 5 before it."""
    slots = np.array([0, dfa.SLOTS.index("duplicate"), INDUCTION, PREVIOUS, 1])
    assert rule.score(np.array([0, 7, 6, 5, 7]), slots) == score


def test_rules_of_features():
    lists = {"reads_ids": np.array([3, 4, 5, 6]), "reads_counts": np.array([60, 20, 4, 3]),
             "fires_on_ids": np.array([9, -1, -1, -1]), "fires_on_counts": np.array([200, 0, 0, 0])}  # fmt: skip
    rows = [{"role": "previous", "dfa_firings": 100, "firings": 200, **lists},
            {"role": None, "dfa_firings": 3, "firings": 10**5, **lists}]  # fmt: skip
    assert rules(pd.DataFrame(rows)) == [
        Rule(PREVIOUS, frozenset({3, 4}), frozenset({9})),
        Rule(None, frozenset(), frozenset()),
    ]


def test_further_firings_are_those_of_the_contexts_behind(gpt2):
    torch.manual_seed(0)
    sae = BlockDiagSAE(gpt2.n_heads, gpt2.d_head, 6).requires_grad_(False)
    contexts = torch.randint(1, 257, (40, 24))
    contexts[:, 0] = 0
    further = FurtherFirings(Reader(sae, gpt2.layer(1)), first=25)
    list(feed(gpt2, contexts, torch.arange(40), {1: [further]}))
    f = sae.encode(gpt2.layer(1).z(contexts)).flatten(2)
    f[:25], f[:, 0] = 0, 0
    names = ("context", "position", "feature", "value")
    context, position, feature, value = (torch.cat(getattr(further, name)) for name in names)
    assert torch.allclose(f[context.long(), position.long(), feature.long()], value, atol=1e-5)
    assert abs(int((f > 0).sum()) - len(value)) <= 2, "but for activations that round to 0"


def planted(n_contexts: int = 30, length: int = 20, first: int = 7):
    """Text of tokens 1 to 6; feature 0 fires after 5, feature 1 on 3, both strongly; 2 at random; 3 twice.

    Weak firings, below the median, are everywhere else.
    """
    torch.manual_seed(0)
    contexts = torch.randint(1, 7, (first + n_contexts, length))
    contexts[:, 0] = 0
    before = torch.nn.functional.pad(contexts[:, :-1], (1, 0))
    f = torch.full((*contexts.shape, 4), 0.1)
    f[..., 0][before == 5], f[..., 1][contexts == 3], f[..., 2][torch.rand(contexts.shape) < 0.2] = 1, 1, 1
    f[..., 3] = 0
    f[first, 1:3, 3] = 1
    f[:first], f[:, 0] = 0, 0
    further = FurtherFirings.__new__(FurtherFirings)
    further._first = first
    context, position, feature = f.nonzero().unbind(1)
    further.context, further.position, further.feature = [context.int()], [position.short()], [feature.int()]
    further.value = [f[context, position, feature]]
    sample = Largest(4, 3)
    sample.at[:], sample.value[:] = 0, 1.0
    return contexts, f, further, sample


def test_examples_fire_strongly_or_not_and_are_drawn_from_all_of_the_text():
    _, f, further, sample = planted()
    table = choose_detection(further, sample, 30, 20, seed=0)
    assert set(table["feature"]) == {0, 1, 2}, "3 fires twice"
    assert table["context"].min() >= 7 and table["position"].min() >= 1
    value = f[tuple(table[name].to_numpy(copy=True).astype(int) for name in ("context", "position", "feature"))]
    assert ((value >= 1).numpy() == table["fires"]).all()
    assert not table.duplicated(["feature", "context", "position"]).any()
    sizes = table.groupby("feature")["fires"].agg(["sum", "size"])
    assert (sizes["sum"] == 20).all() and (sizes["size"] == 40).all()
    assert table["context"].nunique() > 20
    pd.testing.assert_frame_equal(table, choose_detection(further, sample, 30, 20, seed=0))
    ordered = [own.is_monotonic_decreasing for _, own in table.groupby("feature")["fires"]]
    assert not any(ordered), "their order tells nothing"
    assert not any(own.is_monotonic_decreasing for _, own in table.groupby("feature")["fires"]), ()


class Letters:
    d_vocab = 7

    def token_strings(self, ids):
        return ["ab"] * len(ids)


def test_a_true_description_scores_and_a_shuffled_one_does_not():
    contexts, _, further, sample = planted()
    nothing = np.full(3, -1)
    features = pd.DataFrame(
        {
            "feature": range(4),
            "firings": [100, 100, 100, 2],
            "role": ["previous", "self", None, None],
            "dfa_firings": [100, 100, 100, 2],
            "reads_ids": [np.array([5, -1, -1]), np.array([3, -1, -1]), nothing, nothing],
            "reads_counts": [np.array([100, 0, 0]), np.array([100, 0, 0]), np.zeros(3), np.zeros(3)],
            "fires_on_ids": [nothing, np.array([3, -1, -1]), np.array([2, -1, -1]), nothing],
            "fires_on_counts": [np.zeros(3), np.array([100, 0, 0]), np.array([100, 0, 0]), np.zeros(3)],
        }
    )
    detection = choose_detection(further, sample, 30, 20, seed=0)
    scored, figures = score_descriptions(features, detection, contexts, dfa.TokenKinds(Letters(), contexts))
    # After 5 stands in the slot `previous` but where an exact slot comes first: it is a copy, or follows one.
    assert figures["description_auroc"].iloc[1] == figures["description_accuracy"].iloc[1] == 1
    assert figures["description_auroc"].iloc[0] > 0.65
    assert abs(figures["description_auroc"].iloc[2] - 0.5) < 0.25, "a feature that fires at random"
    assert figures.iloc[3].isna().all()
    assert (figures["description_auroc_shuffled"].iloc[:3] < 0.75).all()
    of_one = scored[scored["feature"] == 1]
    assert (of_one["score"] == of_one["fires"].map({True: 1.0, False: 0.0})).all()
