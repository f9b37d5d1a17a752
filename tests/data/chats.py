"""Conversations, and tokenizers with the chat templates that models of several families have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.conversations import Turn

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Shows the turn's number, counted from the end: what was rendered before does not stay.
REWRITING = CHATML.replace("m['role'] +", "m['role'] + (messages | length) | string +")
ENDLESS = CHATML.replace("<|im_end|>", "")
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "marked": MARKED}

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>"]
CORPUS = (Path(__file__), Path(json.__file__), Path(np.__file__))

TALK = [
    Turn("user", "What is 2 + 2?"),
    Turn("assistant", "It is 4."),
    Turn("user", "And für Élise, 東京?"),
    Turn("assistant", "A city;\n\nand a piece 🙂."),
]
WITH_SYSTEM = [Turn("system", "Be brief."), *TALK]
SHORT = TALK[:2]


def save_chat_tokenizer(directory: Path, template: str | None, bos: bool = False) -> Path:
    """A byte-level BPE with a chat template; `bos` makes it put <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text() for path in CORPUS], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def messages(turns: Sequence[Turn]) -> dict[str, Any]:
    return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns]}


def write_conversations(
    root: Path,
    name: str,
    lengths: Sequence[int],
    vocabulary: int,
    seed: int = 0,
    first_token: int = 0,
) -> Path:
    """A data set of random conversations; about half of each is trained, the last token always."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(str(root / f"{name}.bin"), dtype=np.uint16)
    masks = []
    for length in lengths:
        tokens = random.integers(first_token, vocabulary, length)
        mask = (random.random(length) < 0.5).astype(np.uint8)
        mask[-1] = 1
        builder.add_document(torch.from_numpy(tokens), [length])
        masks.append(mask)
    builder.finalize(str(root / f"{name}.idx"))
    (root / f"{name}.mask").write_bytes(np.concatenate(masks).tobytes())
    return root / name
