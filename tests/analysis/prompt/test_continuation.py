"""Continuations against plain forwards of the whole text, one new token at a time, with hooks written here."""

import pytest
import torch

from analysis.prompt.continuation import _choose, continue_prompt
from analysis.prompt.intervene import Intervention, change
from analysis.prompt.run import run_prompt

LAYER, PROMPT, N = 1, "the head reads the", 12
HOOK = f"blocks.{LAYER}.attn.hook_z"
NOTHING = Intervention("scale features of head", 2, 1.0)


@pytest.fixture
def lm(lm, monkeypatch):
    """No token ends a text, unless a test says which."""
    monkeypatch.setattr(type(lm.tokenizer), "eos_token_id", -1, raising=False)
    return lm


def run_of(lm, sae):
    return run_prompt(lm.layer(LAYER), sae, PROMPT)


def plain_logits(lm, sae, tokens, intervention=NOTHING):
    """All logits of a text, with the intervention by a hook on the whole of it."""
    last = tokens.shape[1] - 1 if intervention.last is None else intervention.last

    def edit(z, hook):
        delta = change(sae, sae.encode(z), z, intervention)
        for p in range(intervention.first, min(last, z.shape[1] - 1) + 1):
            z[:, p] += delta[:, p]
        return z

    return lm.model.run_with_hooks(tokens, fwd_hooks=[(HOOK, edit)])


def test_greedy_is_the_likeliest_token_again_and_again(lm, sae):
    """The intervention without a last position goes on at new tokens; the log-probabilities are of both models."""
    run, steer = run_of(lm, sae), Intervention("scale features of head", 2, -6.0)
    texts = continue_prompt(lm.layer(LAYER), sae, run, steer, N)
    for text, intervention in zip(texts, (NOTHING, steer), strict=True):
        tokens = run.tokens[None]
        for _ in range(N):
            chosen = plain_logits(lm, sae, tokens, intervention)[:, -1].argmax(-1)
            tokens = torch.cat([tokens, chosen[None]], 1)
        assert text.ids == tokens[0, len(run.tokens) :].tolist()
        assert text.strings == lm.token_strings(text.ids)
        for found, model in ((text.clean, NOTHING), (text.edited, steer)):
            logits = plain_logits(lm, sae, tokens, model)[0, len(run.tokens) - 1 : -1]
            assert torch.allclose(found, logits.log_softmax(-1)[range(N), text.ids], atol=1e-3)
    assert not torch.allclose(texts[1].clean, texts[1].edited, atol=1e-2), "nothing to see"


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_intervention_that_changes_nothing(lm, sae, temperature):
    clean, edited = continue_prompt(lm.layer(LAYER), sae, run_of(lm, sae), NOTHING, N, temperature, seed=3)
    assert clean.ids == edited.ids
    for text in (clean, edited):
        assert torch.allclose(text.clean, text.edited, atol=1e-4)


def test_a_seed_is_a_text(lm, sae):
    steer = Intervention("scale features of head", 2, -2.0)

    def texts(seed):
        return [text.ids for text in continue_prompt(lm.layer(LAYER), sae, run_of(lm, sae), steer, N, 2.0, seed)]

    assert texts(1) == texts(1) != texts(2)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_draws_follow_the_distribution_at_a_temperature(temperature):
    """As many of evenly spread uniform numbers give a token as its probability says, none where that is 0."""
    logits = torch.tensor([1.0, -1.0, -torch.inf, 3.0, 2.0, -torch.inf], dtype=torch.float64)
    uniform, n = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, len(logits)
    drawn = torch.cat([_choose(logits[None], temperature, each) for each in [*uniform, uniform[0] * 0]])
    probability = (logits / temperature).softmax(-1)
    assert torch.allclose(torch.bincount(drawn, minlength=n) / 1000.0, probability.float(), atol=3e-3)
    assert not {2, 5} & set(drawn.tolist())


def test_a_closed_span_does_not_touch_new_tokens(lm, sae):
    run = run_of(lm, sae)
    last = len(run.tokens) - 1
    closed = Intervention("scale features of head", 2, -6.0, last=last)
    _, edited = continue_prompt(lm.layer(LAYER), sae, run, closed, N)
    tokens = torch.cat([run.tokens, torch.tensor(edited.ids)])[None]
    wanted, open_ended = (
        plain_logits(lm, sae, tokens, Intervention("scale features of head", 2, -6.0, last=end)) for end in (last, None)
    )
    assert edited.ids == wanted[0, last:-1].argmax(-1).tolist()
    found = wanted[0, last:-1].log_softmax(-1)[range(N), edited.ids]
    assert torch.allclose(edited.edited, found, atol=1e-3)
    assert (wanted - open_ended)[0, last + 1 :].abs().max() > 1e-2, "nothing to see"


def test_only_new_tokens(lm, sae):
    """A span may begin after the prompt: the first new token is chosen without it."""
    run = run_of(lm, sae)
    steer = Intervention("scale features of head", 2, -6.0, first=len(run.tokens))
    clean, edited = continue_prompt(lm.layer(LAYER), sae, run, steer, N)
    assert clean.ids[0] == edited.ids[0]
    assert float(clean.clean[0]) == pytest.approx(float(clean.edited[0]), abs=1e-4)
    assert not torch.allclose(clean.clean, clean.edited, atol=1e-3)


def test_it_stops_at_eos(lm, sae, monkeypatch):
    """Each text ends with its own first EOS, and what is after it in the longer one does not matter."""
    run, steer = run_of(lm, sae), Intervention("scale features of head", 2, -6.0)
    endless = continue_prompt(lm.layer(LAYER), sae, run, steer, N)
    for eos in (endless[0].ids[3], endless[1].ids[2]):
        monkeypatch.setattr(type(lm.tokenizer), "eos_token_id", eos, raising=False)
        for text, whole in zip(continue_prompt(lm.layer(LAYER), sae, run, steer, N), endless, strict=True):
            end = whole.ids.index(eos) + 1 if eos in whole.ids else N
            assert text.ids == whole.ids[:end] and len(text.clean) == len(text.edited) == len(text.strings) == end


def test_what_cannot_be_written(lm, sae):
    run, layer = run_of(lm, sae), lm.layer(LAYER)
    room = lm.n_ctx - len(run.tokens)
    with pytest.raises(ValueError, match=f"{room + 1} are to follow, but .* reads at most {lm.n_ctx}"):
        continue_prompt(layer, sae, run, NOTHING, room + 1)
    with pytest.raises(ValueError, match="nothing to write: 0 new tokens"):
        continue_prompt(layer, sae, run, NOTHING, 0)
    with pytest.raises(ValueError, match=r"temperature -1\.0 is below 0"):
        continue_prompt(layer, sae, run, NOTHING, 1, -1.0)
    last = len(run.tokens) + N - 2  # that is read
    continue_prompt(layer, sae, run, Intervention("scale feature", first=last), N)
    with pytest.raises(ValueError, match="are no span of 1 to"):
        continue_prompt(layer, sae, run, Intervention("scale feature", first=last + 1), N)
    with pytest.raises(ValueError, match="there is no feature -1"):
        continue_prompt(layer, sae, run, Intervention("scale feature", -1), N)
