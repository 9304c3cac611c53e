"""Contexts are packed as documented, and whole documents are held out."""

import json

import pytest
import torch

from trainer.data.text import Corpus


def texts_of(corpus, lm, contexts):
    return [lm.tokenizer.decode(context[1:]) for context in contexts]


def test_contexts_begin_with_bos_and_hold_the_text_in_order(gpt2, tmp_path):
    file = tmp_path / "two.jsonl"
    documents = ["alpha " * 30, "bravo " * 30]
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    corpus = Corpus(str(file), gpt2.tokenizer, 16, held_out_fraction=0.3)
    train, held = list(corpus.train()), corpus.held_out(3)
    assert all(len(context) == 16 and context[0] == gpt2.tokenizer.bos_token_id for context in [*train, *held])
    in_training = {name for name in ("alpha", "bravo") if any(name in t for t in texts_of(corpus, gpt2, train))}
    in_held_out = {name for name in ("alpha", "bravo") if any(name in t for t in texts_of(corpus, gpt2, held))}
    assert len(in_training) == 1 and len(in_held_out) == 1 and in_training != in_held_out


def test_every_token_of_the_training_documents_is_used_once(gpt2, text_file):
    corpus = Corpus(str(text_file), gpt2.tokenizer, 32, held_out_fraction=0.1)
    again = Corpus(str(text_file), gpt2.tokenizer, 32, held_out_fraction=0.1)
    contexts = torch.stack(list(corpus.train()))
    assert corpus.n_train_contexts == len(contexts)
    assert torch.equal(contexts, torch.stack(list(again.train()))), "the order is fixed"
    assert torch.equal(contexts[5:], torch.stack(list(corpus.train(5)))), "starting later skips, no more"
    assert corpus.fingerprint == again.fingerprint
    assert corpus.fingerprint != Corpus(str(text_file), gpt2.tokenizer, 33, held_out_fraction=0.1).fingerprint
    n_tokens = sum(len(gpt2.tokenizer(json.loads(line)["text"])["input_ids"]) + 1 for line in text_file.open())
    used = (len(contexts) + len(corpus._held_out)) * 31
    assert n_tokens - 2 * 31 < used <= n_tokens


def test_a_streamed_data_set_gives_the_same_documents_as_the_file(gpt2, text_file, tmp_path):
    """The Hugging Face branch, on a data set in a local folder."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(text_file.read_text())
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: all\n  data_files: train.jsonl\n---\n")
    streamed = Corpus(str(folder), gpt2.tokenizer, 32, held_out_fraction=0.1)
    assert not streamed.finite
    finite = Corpus(str(text_file), gpt2.tokenizer, 32, held_out_fraction=0.1)
    count = lambda contexts: torch.bincount(torch.cat(contexts), minlength=257)  # noqa: E731
    difference = count(list(streamed.train())) - count(list(finite.train()))
    assert difference.abs().sum() <= 2 * 32, "only the tail that fills no context may differ"
    assert len(streamed.held_out(5)) == 5
    first = list(streamed.train())
    assert torch.equal(torch.stack(first[3:]), torch.stack(list(streamed.train(3))))


def test_a_streamed_text_has_another_cache_than_before_it_was_read_in_streams(gpt2, text_file):
    """And a finite one the same as ever."""
    assert Corpus(str(text_file), gpt2.tokenizer, 32).fingerprint == "10ce8d600f7abd61"
    assert Corpus("far/away", gpt2.tokenizer, 32).fingerprint != "a9823e7348b324d8"


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_other_files(gpt2, tmp_path, suffix):
    file = tmp_path / f"text{suffix}"
    documents = [f"document {i} says a few words about attention. \n" * 200 for i in range(10)]
    if suffix == ".txt":
        file.write_text("".join(documents))
    else:
        import pandas as pd

        pd.DataFrame({"text": documents}).to_parquet(file)
    corpus = Corpus(str(file), gpt2.tokenizer, 64, held_out_fraction=0.1)
    assert corpus.n_train_contexts > 500 and len(corpus.held_out(10)) == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"text": "short"}\n{"text": "brief"}\n', "too short"),
        ('{"body": "x"}\n', "has no column 'text'; it has body.*--text_column"),
        ("not json\n", "could not be read"),
    ],
)
def test_bad_text_is_refused_with_a_sentence(gpt2, tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Corpus(str(file), gpt2.tokenizer, 32)


def test_too_few_held_out_tokens_and_missing_files_are_refused(gpt2, text_file):
    with pytest.raises(ValueError, match=r"held-out tokens, but .* are asked for"):
        Corpus(str(text_file), gpt2.tokenizer, 32).held_out(100_000)
    with pytest.raises(ValueError, match="does not exist"):
        Corpus("nowhere.jsonl", gpt2.tokenizer, 32)
    with pytest.raises(ValueError, match="could not be read"):
        list(Corpus("no-such/dataset", gpt2.tokenizer, 32).train())


def test_held_out_tokens_are_at_least_as_many_as_asked_for_or_all(gpt2, text_file, capsys):
    corpus = Corpus(str(text_file), gpt2.tokenizer, 32)
    assert torch.equal(corpus.held_out_tokens(63), corpus.held_out(3)) and not capsys.readouterr().out
    assert len(corpus.held_out_tokens(10**9)) == corpus.n_held_out_contexts
    assert "held-out tokens, all are taken" in capsys.readouterr().out
