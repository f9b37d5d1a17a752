"""What makes documents and token ids of the lines of a file: texts, or conversations."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.conversations import parse_conversation
from megatron_ext.data.jsonl import parse_line
from megatron_ext.data.templates import Template, TemplateName, load_template
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError

Task = Literal["pretrain", "sft"]

TRAINED = np.uint32(1 << 31)
"""Bit of a trained token's id in the shards of conversations."""

_BATCH_CHARACTERS = 1 << 18


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron-core's `DType.optimal_dtype`, without the seconds of its import."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class Reader(Protocol):
    """Lines to documents to token ids."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids in shards."""

    def parse(self, line: bytes) -> tuple[Any, bytes]:
        """A document, and the text by which it is held out or not.

        Raises:
            BadLine: the line is no document.
            Dropped: it is one, but not to be used.
        """

    def encode(self, documents: list[Any]) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        """Ids of all, one after the other, how many each has, and how many had to be cut."""


class Dropped(Exception):
    """A document that is left out and counted, without being at fault."""


@dataclass(frozen=True)
class TextReader:
    """Documents for pretraining: a text under one key."""

    tokenizer: Tokenizer
    json_key: str
    append_eod: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.tokenizer.vocab_size)

    def parse(self, line: bytes) -> tuple[str, bytes]:
        return parse_line(line, self.json_key)

    def encode(self, documents: list[str]) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        eod = [self.tokenizer.eod_id] if self.append_eod else []
        tokens, lengths = [np.empty(0, self.dtype)], []
        for batch in _batches(documents):
            ids = self.tokenizer.encode_batch(batch)
            counts = [len(document) + len(eod) for document in ids]
            flat = chain.from_iterable(piece for document in ids for piece in (document, eod))
            tokens.append(np.fromiter(flat, self.dtype, sum(counts)))
            lengths.extend(counts)
        return np.concatenate(tokens), np.array(lengths, np.int64), 0


@dataclass(frozen=True)
class ConversationReader:
    """Conversations for instruction tuning; a trained token's id carries the bit `TRAINED`."""

    template: Template
    seq_length: int
    dtype: np.dtype[Any] = np.dtype(np.uint32)

    def parse(self, line: bytes) -> tuple[NDArray[np.uint32], bytes]:
        turns, raw = parse_conversation(line)
        tokens, trained = self.template.encode(turns)
        if not trained[: self.seq_length].any():
            raise Dropped
        return tokens.astype(np.uint32) | trained * TRAINED, raw

    def encode(
        self, documents: list[NDArray[np.uint32]]
    ) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        lengths = np.array([len(document) for document in documents], np.int64)
        kept = [np.empty(0, self.dtype), *(document[: self.seq_length] for document in documents)]
        cut = int((lengths > self.seq_length).sum())
        return np.concatenate(kept), np.minimum(lengths, self.seq_length), cut


def make_reader(
    tokenizer: Tokenizer,
    task: Task,
    json_key: str,
    append_eod: bool,
    template: TemplateName,
    seq_length: int,
) -> tuple[Reader, dict[str, Any]]:
    """The reader of a task, and the settings that decide what it makes of a line.

    Raises:
        UserError: the tokenizer lacks a chat template or an end-of-sequence token.
    """
    if task == "sft":
        chosen = load_template(tokenizer, template)
        settings = {"template": chosen.fingerprint, "seq_length": seq_length}
        return ConversationReader(chosen, seq_length), settings
    if append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {tokenizer.path} names no end-of-sequence token to end documents with",
            "name it (eos_token in tokenizer_config.json), or pass --no-append-eod",
        )
    settings = {"json_key": json_key, "append_eod": append_eod}
    return TextReader(tokenizer, json_key, append_eod), settings


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
