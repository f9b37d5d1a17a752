"""Conversations to tokens and masks: what is trained, decoded, must be the answers and their ends.

The masks of templates are also compared with transformers' own, where it can compute them.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.chats import (
    CHATML,
    ENDLESS,
    REWRITING,
    SHORT,
    TALK,
    TEMPLATES,
    WITH_SYSTEM,
    save_chat_tokenizer,
)

from megatron_ext.data.conversations import Turn
from megatron_ext.data.jsonl import BadLine
from megatron_ext.data.templates import Encoded, load_template
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.errors import UserError

TALKS = {"multi-turn": TALK, "system": WITH_SYSTEM, "single": SHORT}
ENDS = {"chatml": "<|im_end|>", "llama2": " </s>", "llama3": "<|eot_id|>", "marked": "<|im_end|>"}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("chat")
    return {
        name: load_tokenizer(save_chat_tokenizer(root / name, template, bos=name == "llama3"))
        for name, template in TEMPLATES.items()
    }


def stretches(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The trained stretches, decoded."""
    pairs = zip(encoded.tokens.tolist(), encoded.trained.tolist(), strict=True)
    return [
        tokenizer.chat.decode([token for token, _ in group])
        for trained, group in groupby(pairs, key=lambda pair: pair[1])
        if trained
    ]


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_trained(
    tokenizers: dict[str, Tokenizer], name: str, talk: str
) -> None:
    tokenizer, turns = tokenizers[name], TALKS[talk]
    template = load_template(tokenizer, "tokenizer")
    encoded = template.encode(turns)
    plain = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = tokenizer.chat.apply_chat_template(plain, tokenize=False)
    assert tokenizer.chat.decode(encoded.tokens) == whole
    lead = " " if name == "llama2" else ""
    answers = [turn.text for turn in turns if turn.role == "assistant"]
    assert stretches(tokenizer, encoded) == [lead + text + ENDS[name] for text in answers]
    # What is given in use before the last answer is what was trained to precede it.
    prompt = template.prompt(turns[:-1])
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert not encoded.trained[len(prompt) - 1] and encoded.trained[len(prompt)]


def test_the_mask_is_transformers_own(tokenizers: dict[str, Tokenizer]) -> None:
    """Of the same text, once marked by the template itself, once found by prefixes."""
    for turns in TALKS.values():
        marked = load_template(tokenizers["marked"], "tokenizer").encode(turns)
        found = load_template(tokenizers["chatml"], "tokenizer").encode(turns)
        assert np.array_equal(marked.tokens, found.tokens)
        assert np.array_equal(marked.trained, found.trained)


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (REWRITING, TALK, "rewrites earlier turns"),
        (ENDLESS, TALK, "ends an answer with no special token"),
        (CHATML.replace("m['content']", "m['content'] | upper"), TALK, "changes the assistant's"),
        (TEMPLATES["llama2"], [TALK[0], *TALK], "refused by the chat template: roles must"),
        (CHATML, [Turn("user", "say <|im_end|>"), TALK[1]], "special token in the text.*turn 1"),
        (CHATML, TALK[1:2], "refused by the chat template"),
    ],
)
def test_what_cannot_be_tokenised_consistently_is_refused(
    tmp_path: Path, template: str, turns: list[Turn], reason: str
) -> None:
    tokenizer = load_tokenizer(save_chat_tokenizer(tmp_path, template))
    with pytest.raises(BadLine, match=reason):
        load_template(tokenizer, "tokenizer").encode(turns)


def test_a_token_across_the_border_of_an_answer_is_refused(tmp_path: Path) -> None:
    """`in` + `dex` has a token of its own in this vocabulary: the prompt ends inside of it."""
    template = CHATML.replace("assistant\n' }}{% endif", "assistant\nin' }}{% endif").replace(
        "m['role'] + '\n'", "m['role'] + ('\nin' if m['role'] == 'assistant' else '\n')"
    )
    tokenizer = load_tokenizer(save_chat_tokenizer(tmp_path, template))
    chosen = load_template(tokenizer, "tokenizer")
    assert len(tokenizer.encode_batch(["int"])[0]) == 1
    with pytest.raises(BadLine, match="a token spans the border of an answer"):
        chosen.encode([TALK[0], Turn("assistant", "t x")])
    assert stretches(tokenizer, chosen.encode([TALK[0], Turn("assistant", " x")])) == [
        " x<|im_end|>"
    ]


VICUNA = " USER: What is 2 + 2? ASSISTANT: It is 4.</s>"
VICUNA += "USER: And für Élise, 東京? ASSISTANT: A city;\n\nand a piece 🙂.</s>"


@pytest.mark.parametrize("bos", [False, True])
def test_vicuna_on_a_hugging_face_tokenizer(tmp_path: Path, bos: bool) -> None:
    tokenizer = load_tokenizer(save_chat_tokenizer(tmp_path, None, bos))
    template = load_template(tokenizer, "vicuna_v1.1")
    begin = "<s>" if bos else ""
    for turns, text in (
        (TALK, VICUNA),
        (WITH_SYSTEM, "Be brief." + VICUNA),
        ([Turn("assistant", "Hello"), *TALK], VICUNA),
    ):
        encoded = template.encode(turns)
        assert tokenizer.chat.decode(encoded.tokens) == begin + text
        assert stretches(tokenizer, encoded) == [f" {TALK[1].text}</s>", f" {TALK[3].text}</s>"]
        prompt = template.prompt(turns[:-1])
        assert encoded.tokens[: len(prompt)].tolist() == prompt
        assert encoded.trained[len(prompt)] and not encoded.trained[len(prompt) - 1]


def test_vicuna_on_a_sentencepiece_model(sentencepiece_model: Path) -> None:
    import sentencepiece

    processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    tokens, trained = load_template(tokenizer, "vicuna_v1.1").encode(TALK)
    begin, end = processor.bos_id(), processor.eos_id()
    rounds = [processor.encode(text) for text in VICUNA.split("</s>")[:2]]
    assert tokens.tolist() == [begin, *rounds[0], end, *rounds[1], end]
    answers = [
        processor.decode([int(token) for token, _ in group if token != end])
        for learns, group in groupby(zip(tokens, trained, strict=True), key=lambda pair: pair[1])
        if learns
    ]
    assert answers == [TALK[1].text, TALK[3].text]
    assert trained[tokens == end].all()


def test_vicuna_wants_turns_in_turn(sentencepiece_model: Path) -> None:
    template = load_template(load_tokenizer(sentencepiece_model), "vicuna_v1.1")
    for turns in ([TALK[0], *TALK], [*TALK, TALK[1]], [TALK[0], Turn("system", "x"), TALK[1]]):
        with pytest.raises(BadLine, match="roles do not alternate"):
            template.encode(turns)
    with pytest.raises(BadLine, match="no assistant turn"):
        template.encode([Turn("system", "x"), Turn("assistant", "Hello")])


def test_a_tokenizer_without_a_template_is_refused(
    tmp_path: Path, sentencepiece_model: Path
) -> None:
    for path in (sentencepiece_model, save_chat_tokenizer(tmp_path, None)):
        with pytest.raises(UserError, match="has no chat template"):
            load_template(load_tokenizer(path), "tokenizer")
