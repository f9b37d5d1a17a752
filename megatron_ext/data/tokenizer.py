"""Tokenizers: the library objects that megatron-core's tokenizer library wraps, and that wrapper.

Importing megatron-core costs about 8 CPU-seconds, and its wrapper encodes one text at a time.
Preprocessing therefore asks the wrapped library itself, in batches; the tests hold the ids, the
vocabulary size and the end-of-document id equal to the wrapper's.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_ext.errors import UserError

TokenizerType = Literal["auto", "sentencepiece", "huggingface"]

_HUGGINGFACE_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer, ready to be forked into workers."""

    path: Path
    """The sentencepiece model file, or the Hugging Face directory."""
    library: Literal["sentencepiece", "huggingface"]
    """Megatron-core's name of the library."""
    vocab_size: int
    eod_id: int | None
    """Id that ends a document (the tokenizer's EOS); None where the tokenizer names none."""
    fingerprint: str
    """SHA-256 over everything that decides the ids; equal fingerprints give equal ids."""
    encode_batch: Callable[[list[str]], list[list[int]]]
    """Texts to ids on one thread, without special tokens around them."""
    decode: Callable[[list[int]], str]
    """Ids to text, special tokens included."""
    bos_id: int | None = None
    """Id that the tokenizer puts before a text; None where it puts none."""
    special: dict[str, int] = field(default_factory=dict)
    """Texts that `encode_batch` reads as special tokens, and their ids."""
    chat: Any = None
    """The Hugging Face tokenizer, which renders its chat template; None for sentencepiece."""


def load_tokenizer(path: Path, tokenizer_type: TokenizerType = "auto") -> Tokenizer:
    """Load a sentencepiece `.model` file, or a Hugging Face `tokenizer.json` or its directory.

    Raises:
        UserError: the path does not exist, holds no tokenizer, or the library cannot read it.
    """
    library, path = _locate(Path(path), tokenizer_type)
    load = _load_sentencepiece if library == "sentencepiece" else _load_huggingface
    return load(path)


def load_megatron_tokenizer(tokenizer: Tokenizer) -> Any:
    """The same tokenizer as megatron-core's `MegatronTokenizerText`, for its own data sets."""
    from megatron.core.tokenizers import MegatronTokenizer

    # The defaults of these two differ between 0.16 (slow, no special tokens) and 0.19.
    options = {"use_fast": True, "include_special_tokens": False}
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(tokenizer.path),
        metadata_path={"library": tokenizer.library},
        **(options if tokenizer.library == "huggingface" else {}),
    )


def _locate(
    path: Path, tokenizer_type: TokenizerType
) -> tuple[Literal["sentencepiece", "huggingface"], Path]:
    """The library and the path that it wants, from what the user gave."""
    if not path.exists():
        raise UserError(
            f"tokenizer {path} does not exist",
            "give a sentencepiece .model file or a directory with a tokenizer.json",
        )
    if path.is_file():
        if tokenizer_type == "auto":
            tokenizer_type = "huggingface" if path.suffix == ".json" else "sentencepiece"
        if tokenizer_type == "sentencepiece":
            return "sentencepiece", path
        if path.name not in _HUGGINGFACE_FILES:
            raise UserError(
                f"tokenizer {path}: a Hugging Face tokenizer file is called tokenizer.json",
                "rename it, or give the directory that holds it",
            )
        return "huggingface", path.parent
    model = path / "tokenizer.model"
    has_files = any((path / name).is_file() for name in _HUGGINGFACE_FILES)
    if tokenizer_type == "huggingface" or (tokenizer_type == "auto" and has_files):
        return "huggingface", path
    if not model.is_file():
        raise UserError(
            f"tokenizer directory {path} holds no tokenizer.json and no tokenizer.model",
            "give the .model file itself, or a directory saved with save_pretrained()",
        )
    return "sentencepiece", model


def _load_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    content = path.read_bytes()
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        vocab_size, eos_id = processor.get_piece_size(), processor.eos_id()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"tokenizer {path} cannot be read as a sentencepiece model: {error}",
            "is it a Hugging Face tokenizer? then give its directory",
        ) from error
    return Tokenizer(
        path=path,
        library="sentencepiece",
        vocab_size=vocab_size,
        eod_id=eos_id if eos_id >= 0 else None,
        fingerprint=hashlib.sha256(content).hexdigest(),
        encode_batch=lambda texts: processor.encode(texts, num_threads=1),
        decode=processor.decode,
        bos_id=bos_id if (bos_id := processor.bos_id()) >= 0 else None,
    )


def _load_huggingface(path: Path) -> Tokenizer:
    # Not `tokenizers.Tokenizer.from_file`: some classes of AutoTokenizer rebuild the pipeline that
    # tokenizer.json describes, and it is AutoTokenizer that megatron-core and inference use.
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # every tokenizer class raises its own
        raise UserError(
            f"tokenizer {path} cannot be loaded by transformers: {error}",
            "give a directory saved with save_pretrained()",
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"tokenizer {path} is a {type(loaded).__name__}, which has no fast implementation",
            "use a model whose directory has a tokenizer.json",
        )
    # Lengths set in tokenizer.json would silently cut or fill every document.
    backend.no_truncation()
    backend.no_padding()
    around = backend.encode("", add_special_tokens=True).ids
    identity = f"{backend.to_str()}\neod={loaded.eos_token_id}"
    return Tokenizer(
        path=path,
        library="huggingface",
        vocab_size=len(loaded),
        eod_id=loaded.eos_token_id,
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        encode_batch=lambda texts: [
            encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ],
        decode=lambda ids: str(loaded.decode(ids)),
        bos_id=loaded.bos_token_id if loaded.bos_token_id in around[:1] else None,
        special={
            token.content: id_
            for id_, token in loaded.added_tokens_decoder.items()
            if token.special
        },
        chat=loaded,
    )
