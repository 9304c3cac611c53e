"""Streams that break off anywhere, any number of times, lose and repeat nothing; damaged files are one sentence."""

import bz2
import gzip
import lzma
import random

import pyarrow as pa

from trainer.data import streams, textfiles
from trainer.data.documents import documents


def test_streams_that_break_off(tries, fault, monkeypatch):
    monkeypatch.setattr(streams, "_WAITS", (0, 0, 0))
    records = [{"text": str(i)} for i in range(60)]
    n = tries(20, 500)
    for seed in range(n):
        chance = random.Random(seed)
        breaks = sorted({chance.randrange(60) for _ in range(chance.randrange(1, 8))})

        def opened(*_, breaks=breaks):
            for i, record in enumerate(records):
                if breaks and i == breaks[0]:
                    breaks.pop(0)
                    raise ConnectionError("gone")
                yield record

        monkeypatch.setattr(streams, "_open", opened)
        assert list(streams.stream("far", None, "train")) == records
        assert not breaks
    fault("texts", "a streamed data set breaks off 1 to 7 times", n, "every record once, in order")


def test_damaged_compressed_files(tries, fault, tmp_path):
    """A file that was cut off reads as it was, or is refused with a sentence."""
    content = "\n".join(f'{{"text": "document {i} {i * 7919 % 1000}"}}' for i in range(200)).encode()
    whole = [f"document {i} {i * 7919 % 1000}" for i in range(200)]
    n = tries(10, 200)
    for suffix, packed in {
        ".gz": gzip.compress(content), ".bz2": bz2.compress(content), ".xz": lzma.compress(content),
        ".zst": pa.compress(content, "zstd", asbytes=True),
    }.items():  # fmt: skip
        file = tmp_path / f"a.jsonl{suffix}"
        for seed in range(n):
            file.write_bytes(packed[: random.Random(seed).randrange(1, len(packed) - 8)])
            refusal = None
            try:
                assert list(documents(textfiles.read(file, "text", {"-"}), "text", file.name, 257)) == whole
            except ValueError as error:
                refusal = str(error)
            assert refusal is None or ("could not be read" in refusal and "\n" not in refusal)
    fault("texts", "a compressed file is cut off", 4 * n, "refused with one sentence, never a shorter text")
