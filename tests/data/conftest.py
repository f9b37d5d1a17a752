"""Real text and tokenizers trained on it."""

import json
import sysconfig
from pathlib import Path

import pytest
from data.corpora import EOS


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """About 0.9 MB of the standard library, in documents of 2,000 characters, all different."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:32]:
        source = path.read_text(encoding="utf-8")
        pieces = (source[i : i + 2000] for i in range(0, len(source), 2000))
        found.update(dict.fromkeys(piece for piece in pieces if piece.strip()))
    return list(found) + ["Ein Gedicht: für Élise, 東京, 🙂.\n\tEnde", "one  two\u2028three"]


@pytest.fixture(scope="session")
def sentencepiece_model(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts[:300] for line in text.splitlines() if line),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def huggingface_directory(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that, like many on the hub, carries a truncation and a BOS template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<s>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:300], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.enable_truncation(16)
    directory = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": EOS}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer_path(
    request: pytest.FixtureRequest, sentencepiece_model: Path, huggingface_directory: Path
) -> Path:
    return sentencepiece_model if request.param == "sentencepiece" else huggingface_directory
