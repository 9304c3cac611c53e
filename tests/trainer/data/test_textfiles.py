"""Files as people have them are read, and what cannot be is refused with what and where."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trainer.data import textfiles
from trainer.data.documents import documents
from trainer.data.text import Corpus

TEXTS = ["first, with a comma", 'second "quoted"\nover two lines', "drittes: Größe 木", "fourth"]
LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS)
CSV = "id,text\r\n" + "".join('{},"{}"\r\n'.format(i, t.replace('"', '""')) for i, t in enumerate(TEXTS))
READ = {
    "a.jsonl": LINES, "blank.NDJSON": LINES.replace("\n", "\n\n") + "\n\n", "bom.jsonl": "\ufeff" + LINES,
    "lines.json": LINES, "array.json": json.dumps([{"text": text} for text in TEXTS], indent=1),
    "strings.json": json.dumps(TEXTS), "columns.json": json.dumps({"text": TEXTS, "n": [1, 2, 3, 4]}),
    "pandas.json": json.dumps({"text": dict(enumerate(TEXTS))}), "a.csv": CSV, "bom.CSV": "\ufeff" + CSV,
    "a.tsv": CSV.replace(",", "\t").replace("first\t", "first,"),
}  # fmt: skip
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}  # fmt: skip


def read(path, column="text") -> list:
    return list(documents(textfiles.read(path, column, {"<|endoftext|>"}), column, path.name, 257))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("compression", PACK)
def test_every_kind_holds_the_same_texts(tmp_path, name, compression):
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(PACK[compression](READ[name].encode()))
    assert read(file) == TEXTS and textfiles.find(str(file)) == [file]


def test_parquet_utf_16_folders_and_globs(gpt2, tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": [text.encode() for text in TEXTS]}), tmp_path / "bytes.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "wide.jsonl").write_text(LINES, encoding="utf-16")
    for file in tmp_path.iterdir():
        assert read(file) == TEXTS, file.name
    (tmp_path / "README.md").write_text("about it")
    (tmp_path / ".hidden.jsonl").write_text("not read")
    files = textfiles.find(str(tmp_path))
    assert [file.name for file in files] == ["a.parquet", "b.parquet.gz", "bytes.parquet", "wide.jsonl"]
    assert [file.name for file in textfiles.find(f"{tmp_path}/*.parquet")] == ["a.parquet", "bytes.parquet"]


def test_records_without_text_are_left_out_and_counted(gpt2, tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"text {i} " * 20}) for i in range(40)]
    empty = ["null", '{"text": null}', '{"text": ""}', '{"text": " \\n"}', '{"text": NaN}', '{"other": 1}']
    file.write_text("\n".join(empty + lines))
    assert Corpus(str(file), gpt2.tokenizer, 16).describe().endswith("; 6 records without text are left out")


REFUSED = {
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}', "record 2 of number.jsonl holds no text but int: 5"),
    "list.jsonl": (b'{"text": ["a"]}', "record 1 of list.jsonl holds no text but list"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
    "latin.txt": (b"a" * 20_000 + b"\xe9 b", "byte 20,000 is not utf-8"),
    "body.csv": (b"id,body\n1,a\n", "no column 'text'; it has id, body: .*--text_column"),
    "comma.csv": (b"id,text\n1,a, b\n", "line 2 has more fields"),
    "open.csv": (b'id,text\n1,"a\n', "is not a row"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], "could not be read"),
    "cut.jsonl.zst": (pa.compress(LINES.encode() * 50, "zstd", asbytes=True)[:-12], "could not be read"),
    "a.parquet": (b"PAR1", "could not be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_what_and_where(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_names_that_mean_no_file(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    for name, message in (
        ("a.docx", "of a kind that is not read"),
        ("*.csv", "no file matches"),
        ("b.csv.gz", "exist"),
    ):
        with pytest.raises(ValueError, match=message):
            textfiles.find(str(tmp_path / name))


def test_a_text_of_one_line_is_cut_at_spaces(tmp_path):
    for line in ("word " * 4000, "x" * 20_000, "word " * 300_000 + "\nshort\n" * 9000):
        (tmp_path / "a.txt").write_text(line)
        sections = read(tmp_path / "a.txt")
        assert "".join(sections).strip() == line.strip() and len(sections) > 1
        assert max(map(len, sections)) < 16_001


def test_text_that_spells_special_tokens_is_text(gpt2, tmp_path):
    file = tmp_path / "stories.txt"
    stories = [f"story {i} says <|endoftext|> inside. " * 5 for i in range(60)]
    file.write_text("\n<|endoftext|>\n".join(stories))
    corpus = Corpus(str(file), gpt2.tokenizer, 32)
    contexts = corpus.held_out_tokens(10**6)
    found = corpus.documents(contexts).unique()
    assert found.tolist() == corpus._held_out_ids[: len(found)] and len(found) > 1
    assert int((contexts[:, 1:] == gpt2.tokenizer.eos_token_id).sum()) in (len(found), len(found) - 1)
    assert 0 not in gpt2.to_tokens("a <|endoftext|> b")[0, 1:]
    assert torch.equal(gpt2.to_tokens("a \ud83d"), gpt2.to_tokens("a \ufffd"))
