"""A stream goes on at a mark exactly where it would have been, without tokenising what comes before."""

import json

import pytest
import torch

from tests.helpers import save_tokenizer, write_data_set
from trainer.data import marks, text
from trainer.data.text import Corpus

STREAM = 1


def records(word: str) -> list[list[dict]]:
    """Of uneven files: some fill several contexts, some a part of one, some hold nothing."""
    return [
        [{"text": f"{word} {file} {i} " * (1 + 7 * (i % 5)) * (i % 6 > 0)} for i in range(40 + 5 * file)]
        for file in range(9)
    ]


@pytest.fixture
def corpus(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(marks, "_EVERY", 10)
    return Corpus(str(write_data_set(tmp_path / "data", records("head"))), gpt2.tokenizer, 32, 0.1)


@pytest.fixture
def tokenised(monkeypatch):
    """Documents that were."""
    found, token_ids = [], text.token_ids
    monkeypatch.setattr(text, "token_ids", lambda *a: found.append(a[1]) or token_ids(*a))
    return found


def whole(corpus: Corpus) -> torch.Tensor:
    return torch.stack(list(corpus.train(0, STREAM)))


def file_of(corpus: Corpus):
    return corpus._marks / f"{STREAM}.json"


def test_a_later_start_tokenises_from_the_mark_before_it(corpus, tokenised):
    contexts = whole(corpus)
    of_all = len(tokenised)
    assert len(json.loads(file_of(corpus).read_text())) == (len(contexts) - 1) // 10 > 15
    for start in (9, 10, 11, 29, 437, len(contexts) - 1, len(contexts)):
        assert torch.equal(torch.stack([contexts[0], *corpus.train(start, STREAM)])[1:], contexts[start:])
        tokenised.clear()
        next(corpus.train(start, STREAM), None)
        assert len(tokenised) <= 10 < of_all / 10, "those of the contexts since the mark"


@pytest.mark.parametrize(
    "damage", ["lost", "not JSON", "cut off", "of another kind", "record", "used", "far", "number", "zero", "all"]
)
def test_damaged_marks_are_written_anew(corpus, damage):
    contexts, file = whole(corpus), file_of(corpus)
    before = file.read_text()
    good = json.loads(before)
    record, used, check = good["40"]
    changed = {
        "lost": "", "not JSON": "{", "cut off": before[:200], "of another kind": "[1]",
        "record": good | {"40": [record + 1, used, check]}, "used": good | {"40": [record, used + 1, check]},
        "far": good | {"40": [10**12, used, check]}, "number": good | {"41": good["40"]},
        "zero": {"0": good["40"]}, "all": dict.fromkeys(good, good["40"]),
    }[damage]  # fmt: skip
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    if damage == "lost":
        file.unlink()
    assert torch.equal(torch.stack(list(corpus.train(45, STREAM))), contexts[45:])
    written = json.loads(file.read_text())
    assert all(written[number] == mark for number, mark in good.items() if int(number) >= 50)


def test_marks_of_a_text_that_has_changed_are_not_believed(corpus, gpt2, tmp_path):
    """Unnoticed by its fingerprint: a local data set is known by the sizes of its files."""
    before = whole(corpus)
    write_data_set(tmp_path / "other", records("tail"))
    (tmp_path / "data").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "data")
    text.streams._load.cache_clear()
    changed = Corpus(corpus.name, gpt2.tokenizer, 32, 0.1)
    assert changed.fingerprint == corpus.fingerprint
    late = torch.stack(list(changed.train(60, STREAM)))
    assert torch.equal(late, whole(changed)[60:]) and not torch.equal(late, before[60 : 60 + len(late)])


def test_marks_are_of_one_tokenizer_and_need_no_folder(corpus, gpt2, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    more = AutoTokenizer.from_pretrained(tmp_path)
    more.add_tokens(["head"])
    other = Corpus(corpus.name, more, 32, 0.1)
    assert other.fingerprint == corpus.fingerprint and other._marks != corpus._marks
    contexts = whole(corpus)
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTN_SAES_CACHE", str(tmp_path / "file"))
    again = Corpus(corpus.name, gpt2.tokenizer, 32, 0.1)
    assert torch.equal(torch.stack(list(again.train(25, STREAM))), contexts[25:])
