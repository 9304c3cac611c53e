"""Data sets: configurations, splits, saved to disk, tokenised; and streams that break off."""

import json
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import write_data_set, write_text
from trainer.data import streams
from trainer.data.documents import documents, hash_fraction
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


@pytest.mark.parametrize("kind", ["files", "texts", "ids"])
def test_all_streams_together_hold_every_training_document_once(gpt2, tmp_path, kind):
    """Of uneven files, and of texts and token ids that were saved to disk."""
    from datasets import Dataset, DatasetDict

    folder, content = tmp_path / kind, {record["text"]: record["text"] for record in RECORDS}
    if kind == "files":
        ends = [0, 3, 4, 40, 41, 90, 91, 120, 121, 200]
        without = [{"text": " "}, {"text": None}]
        write_data_set(folder, [RECORDS[a:b] + without for a, b in pairwise(ends)])
    elif kind == "texts":
        Dataset.from_list(RECORDS).save_to_disk(folder)
    else:  # BOS and EOS around them are not doubled
        content = {text: [0, *gpt2.tokenizer(text)["input_ids"], 0] for text in content}
        DatasetDict({"train": Dataset.from_dict({"input_ids": list(content.values())})}).save_to_disk(folder)
        with pytest.raises(ValueError, match="with the split train"):
            Corpus(str(folder), gpt2.tokenizer, 32, dataset_split="test").held_out(1)
    corpus = Corpus(str(folder), gpt2.tokenizer, 32, held_out_fraction=0.2)
    assert corpus.n_streams == (2 if kind == "files" else 16)
    read, cut = [], []
    for stream in range(corpus.n_streams):
        tokens = torch.cat([context[1:] for context in corpus.train(0, stream)])
        *whole, last = gpt2.tokenizer.decode(tokens).split("<|endoftext|>")
        read += whole
        cut += [last] * bool(last)
    missing = {text for text, document in content.items() if hash_fraction(document) >= 0.2} - set(read)
    assert len(set(read)) == len(read) and set(read) <= set(content)
    assert not [text for text in read if hash_fraction(content[text]) < 0.2]
    assert len(missing) == len(cut) and all(any(text.startswith(last) for text in missing) for last in cut)


@pytest.mark.parametrize(
    ("files", "expected"), [(1, 1), (7, 1), (8, 2), (9, 2), (21, 5), (23, 3), (63, 15), (80, 16), (1000, 16)]
)
def test_few_files_are_left_over_and_none_is_alone_in_a_stream(files, expected, monkeypatch):
    monkeypatch.setattr(streams, "_load", lambda *_: SimpleNamespace(num_shards=files))
    assert streams.n_streams("far", None, "train") == expected


@pytest.mark.parametrize("ids", [[1, 257], [-1]])
def test_token_ids_of_another_model_are_refused(gpt2, tmp_path, ids):
    file = tmp_path / "ids.jsonl"
    file.write_text(json.dumps({"input_ids": [1, 2]}) + "\n" + json.dumps({"input_ids": ids}))
    with pytest.raises(ValueError, match=r"record 2 of .* tokenised for another model"):
        Corpus(str(file), gpt2.tokenizer, 32)


def breaking(monkeypatch, at: list[int], error: type[Exception]) -> None:
    """Every opening of the stream breaks before the next of these records; afterwards it holds."""
    left = list(at)

    def opened(*_):
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


def test_one_of_several_streams_goes_on_where_it_broke_and_begins_where_it_is_told_to(monkeypatch, capsys, tmp_path):
    name = str(write_data_set(tmp_path / "far", [RECORDS[i : i + 10] for i in range(0, 80, 10)]))
    whole = list(streams.stream(name, None, "train", 1, 2))
    assert len(whole) == 40
    opened, breaks = streams._open, [5, 12]

    def breaking(*which):
        records = iter(opened(*which))
        if breaks:
            yield from islice(records, breaks.pop(0))
            raise ConnectionError("gone")
        yield from records

    monkeypatch.setattr(streams, "_open", breaking)
    monkeypatch.setattr(streams, "_WAITS", (0, 0))
    assert list(streams.stream(name, None, "train", 1, 2, start=3)) == whole[3:]
    assert "far', stream 2 of 2 broke off after 12 records (gone)" in capsys.readouterr().err


def test_a_record_keeps_its_number_where_others_are_left_out():
    with pytest.raises(ValueError, match="record 1,002 of here holds no text but int"):
        list(documents([{"other": "1,001"}, {"text": 5}], "text", "here", 257, start=1000))
