"""Whether the shipped figures come out again: minutes each, so `make results` runs them and `make test` does not."""

import pytest

from tests.helpers import ROOT
from trainer.checkpoint import list_checkpoints
from trainer.evaluate import evaluate_tokens


@pytest.mark.parametrize("checkpoint", list_checkpoints(ROOT / "checkpoints").readable, ids=lambda each: each.name)
def test_a_shipped_checkpoint_is_what_its_eval_json_says(checkpoint, smollm2):
    stored, corpus = checkpoint.eval, checkpoint.open_text(smollm2.tokenizer)
    held_out = corpus.held_out(stored["n_tokens"] // (corpus.context_size - 1))
    layer = smollm2.layer(checkpoint.layer)
    (found,) = evaluate_tokens(layer, [checkpoint.sae], held_out, 1, per_head=False)
    assert found["n_tokens"] == stored["n_tokens"]
    for key in ("L0", "FVU", "KL_zero", "KL_score", "CE_clean", "FVU_per_head"):
        assert found[key] == pytest.approx(stored[key], rel=1e-3), key


@pytest.fixture(scope="session")
def smollm2():
    from trainer import embedded
    from trainer.model.lm import LanguageModel

    return LanguageModel.load(embedded.NAME)
