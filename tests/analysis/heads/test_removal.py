"""Removing a head equals a whole forward in which its z is replaced by hand."""

import pytest
import torch

from analysis.heads import removal
from analysis.heads.removal import derangement, remove
from analysis.heads.table import ABLATIONS


def contexts(n: int = 4, length: int = 13) -> torch.Tensor:
    found = torch.randint(1, 257, (n, length), generator=torch.Generator().manual_seed(0))
    found[:, 0] = 0
    return found


@pytest.mark.parametrize("model", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("together", [1, 200], ids=["one head a forward", "several heads a forward"])
def test_against_a_forward_with_a_hook(model, together, request, monkeypatch):
    monkeypatch.setitem(removal._TOGETHER, "cpu", together)
    lm, tokens, first = request.getfixturevalue(model), contexts(), 5
    found = remove(lm, tokens, first, ABLATIONS, 7, "", lambda line: None)
    clean_logits, cache = lm.model.run_with_cache(tokens)
    clean = clean_logits[:, first:-1].log_softmax(-1)
    targets = tokens[:, first + 1 :, None]
    clean_ce = -clean.gather(-1, targets)[..., 0]
    assert found.n_scored == 7
    assert torch.allclose(found.clean_ce, clean_ce.sum(1).double(), atol=1e-3)
    other = derangement(4, 7)
    for layer in range(lm.n_layers):
        name = f"blocks.{layer}.attn.hook_z"
        z = cache[name]
        instead = {"zero": torch.zeros_like(z), "mean": z[:, 1:].mean((0, 1)).expand_as(z), "resample": z[other]}
        for head in range(lm.n_heads):
            for ablation in ABLATIONS:

                def replace(value, hook, head=head, by=instead[ablation]):
                    value = value.clone()
                    value[:, 1:, head] = by[:, 1:, head]
                    return value

                with torch.no_grad():
                    logits = lm.model.run_with_hooks(tokens, fwd_hooks=[(name, replace)])
                log_probs = logits[:, first:-1].log_softmax(-1)
                ce = -log_probs.gather(-1, targets)[..., 0] - clean_ce
                kl = (clean.exp() * (clean - log_probs)).sum(-1)
                assert torch.allclose(found.ce[ablation][layer, head], ce.sum(1).double(), atol=2e-3)
                assert torch.allclose(found.kl[ablation][layer, head], kl.sum(1).double(), atol=2e-3)
    assert max(float(kl.min()) for kl in found.kl.values()) > -1e-3
    assert min(float(kl.max()) for kl in found.kl.values()) > 0.01, "each does something"


@pytest.mark.parametrize("n", [2, 3, 10, 64])
def test_every_context_gets_that_of_another_one(n):
    for seed in range(20):
        other = derangement(n, seed)
        assert sorted(other.tolist()) == list(range(n))
        assert (other != torch.arange(n)).all()
        assert torch.equal(other, derangement(n, seed)), "seeded"


def test_the_layers_before_are_not_run_again(gpt2, monkeypatch):
    """Blocks run, of all heads: those from the head's own layer on, and a few for what is clean."""
    ran = []
    for index, block in enumerate(gpt2.model.blocks):
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, f=forward, i=index, **k: (ran.append(i), f(*a, **k))[1])
    remove(gpt2, contexts(2), 1, ("zero",), 0, "", lambda line: None)
    several = -(-gpt2.n_heads // (1024 // 26))
    for layer in range(gpt2.n_layers):
        assert ran.count(layer) <= several * (layer + 1) + 3


def test_how_long_it_takes_is_said_before(gpt2):
    said = []
    remove(gpt2, contexts(2), 1, ("zero",), 0, "Removing heads", said.append)
    assert len(said) == 1 and said[0].startswith("Removing heads: 24 runs over 22 scored tokens, about ")
