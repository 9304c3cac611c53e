"""Data sets: configurations, splits, saved to disk, tokenised; and streams that break off."""

import json

import pytest
import torch

from tests.helpers import write_text
from trainer.data import streams
from trainer.data.text import Corpus

RECORDS = [{"text": f"record {i} " * 20} for i in range(200)]


@pytest.fixture
def two_configurations(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "a.jsonl")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files: en/*.jsonl\n- config_name: de\n  data_files: de/*.jsonl\n---\n"
    )
    return str(tmp_path)


def test_a_configuration_is_asked_for_and_named(gpt2, two_configurations):
    for options, message in (
        ({}, "configurations en, de: name one with --dataset_config"),
        ({"dataset_config": "fr"}, "configurations en, de: name one with --dataset_config"),
        ({"dataset_config": "en", "dataset_split": "test"}, "splits train: name one with --dataset_split"),
    ):
        with pytest.raises(ValueError, match=message):
            Corpus(two_configurations, gpt2.tokenizer, 32, **options).held_out(1)
    english, german = (Corpus(two_configurations, gpt2.tokenizer, 32, dataset_config=name) for name in ("en", "de"))
    assert not english.finite and len(english.held_out(2)) == 2
    assert english.fingerprint != german.fingerprint, "two configurations have two caches"


def test_a_file_has_no_configuration(gpt2, text_file):
    with pytest.raises(ValueError, match="is no data set"):
        Corpus(str(text_file), gpt2.tokenizer, 32, dataset_config="en")


def test_saved_to_disk_and_tokenised(gpt2, tmp_path):
    from datasets import Dataset, DatasetDict

    ids = [[0, *gpt2.tokenizer(record["text"])["input_ids"], 0] for record in RECORDS]
    DatasetDict({"train": Dataset.from_dict({"input_ids": ids})}).save_to_disk(tmp_path / "ids")
    Dataset.from_list(RECORDS).save_to_disk(tmp_path / "texts")
    tokenised, texts = (Corpus(str(tmp_path / name), gpt2.tokenizer, 32) for name in ("ids", "texts"))
    count = lambda corpus: torch.bincount(torch.cat([*corpus.train(), *corpus.held_out_tokens(10**6)]), minlength=257)  # noqa: E731
    assert (count(tokenised) - count(texts)).abs().sum() <= 4 * 32, "BOS and EOS around them are not doubled"
    with pytest.raises(ValueError, match="with the split train"):
        Corpus(str(tmp_path / "ids"), gpt2.tokenizer, 32, dataset_split="test").held_out(1)


@pytest.mark.parametrize("ids", [[1, 257], [-1]])
def test_token_ids_of_another_model_are_refused(gpt2, tmp_path, ids):
    file = tmp_path / "ids.jsonl"
    file.write_text(json.dumps({"input_ids": [1, 2]}) + "\n" + json.dumps({"input_ids": ids}))
    with pytest.raises(ValueError, match=r"record 2 of .* tokenised for another model"):
        Corpus(str(file), gpt2.tokenizer, 32)


def breaking(monkeypatch, at: list[int], error: type[Exception]) -> None:
    """Every opening of the stream breaks before the next of these records; afterwards it holds."""
    left = list(at)

    def opened(name, config, split):
        stop = left.pop(0) if left else len(RECORDS)
        yield from RECORDS[:stop]
        if stop < len(RECORDS):
            raise error("gone")

    monkeypatch.setattr(streams, "_open", opened)
    monkeypatch.setattr(streams, "_WAITS", (0, 0, 0))


class PayloadError(Exception):
    """Like aiohttp's errors, which are no OSError."""

    __module__ = "aiohttp.client_exceptions"


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, PayloadError])
def test_a_stream_that_breaks_off_goes_on_where_it_broke(monkeypatch, capsys, error):
    breaking(monkeypatch, [50, 50, 20, 120, 120, 199], error)
    assert list(streams.stream("far", None, "train")) == RECORDS
    assert capsys.readouterr().err.count("broke off") == 6


def test_a_stream_that_stays_away_says_what_was_read_and_how_to_go_on(monkeypatch):
    breaking(monkeypatch, [50] * 9, ConnectionError)
    found = []
    with pytest.raises(ValueError, match=r"broke off after 50 records \(gone\).*run the same command again"):
        found.extend(streams.stream("far", None, "train"))
    breaking(monkeypatch, [50], FileNotFoundError)  # nothing that passes
    with pytest.raises(ValueError, match="could not be read: gone"):
        list(streams.stream("far", None, "train"))
