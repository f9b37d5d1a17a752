"""Conversations to token ids, and which of them are trained: the assistant's text and its end.

A trained stretch begins where the prompt ends that the model is given in use: the ids of the prompt
alone must be the first ids of the whole conversation. Where they are not (a token that spans the
border, a template that rewrites earlier turns) the conversation is refused, never masked.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_ext.data.conversations import Turn
from megatron_ext.data.jsonl import BadLine
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import UserError

TemplateName = Literal["tokenizer", "vicuna_v1.1"]


class Encoded(NamedTuple):
    """One conversation."""

    tokens: NDArray[np.int64]
    """[n]."""
    trained: NDArray[np.bool_]
    """[n]; True where the token is to be predicted."""


class Template(Protocol):
    """How turns become tokens."""

    fingerprint: str
    """Equal fingerprints (with equal tokenizers) give equal tokens and masks."""

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """A conversation that ends with the assistant; a BadLine if it does not fit."""

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """What the model is given to answer turns that end with the user's."""


def load_template(tokenizer: Tokenizer, name: TemplateName) -> Template:
    """A template for a tokenizer.

    Raises:
        UserError: the tokenizer has no chat template, or no end-of-sequence token.
    """
    if name == "vicuna_v1.1":
        return Vicuna(tokenizer)
    if tokenizer.chat is None or not tokenizer.chat.chat_template:
        raise UserError(
            f"tokenizer {tokenizer.path} has no chat template",
            "pass --template vicuna_v1.1, or take the tokenizer of an instruction-tuned model",
        )
    return ChatTemplate(tokenizer)


class Vicuna:
    """FastChat's vicuna_v1.1, as MoE-SFT trains with it.

    `{system} USER: {u} ASSISTANT: {a}</s>USER: ...`; without a system prompt the text begins with
    the space. A leading turn of the assistant is left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eod_id is None:
            raise UserError(
                f"tokenizer {tokenizer.path} names no end-of-sequence token to end answers with",
                "name it (eos_token in tokenizer_config.json)",
            )
        self._tokenizer, self._end = tokenizer, tokenizer.eod_id
        self._begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._reserved = _any_of(tokenizer.special)
        self.fingerprint = f"vicuna_v1.1 bos={tokenizer.bos_id} eos={tokenizer.eod_id}"

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        _refuse_special(turns, self._reserved)
        rounds = self._rounds(turns)
        texts = [text for ask, answer in rounds for text in (ask, f"{ask} {answer}")]
        ids = self._tokenizer.encode_batch(texts)
        tokens, trained = list(self._begin), [False] * len(self._begin)
        # Ends are ids of their own, so each round is tokenised by itself.
        for ask, whole in zip(ids[::2], ids[1::2], strict=True):
            _check_prefix(ask, whole)
            tokens += [*whole, self._end]
            trained += [False] * len(ask) + [True] * (len(whole) - len(ask) + 1)
        return Encoded(np.array(tokens, np.int64), np.array(trained))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        rounds = self._rounds([*turns, Turn("assistant", "")])
        texts = [ask + (f" {answer}" if answer else "") for ask, answer in rounds]
        ids = list(self._begin)
        for number, piece in enumerate(self._tokenizer.encode_batch(texts), 1):
            ids += piece + ([self._end] if number < len(rounds) else [])
        return ids

    @staticmethod
    def _rounds(turns: Sequence[Turn]) -> list[tuple[str, str]]:
        """Texts up to "ASSISTANT:" and the answers to them."""
        rest = list(turns)
        system = rest.pop(0).text if rest[0].role == "system" else ""
        if rest[0].role == "assistant":
            rest.pop(0)
        if not rest:
            raise BadLine("no assistant turn", "but one that answers nothing")
        for number, turn in enumerate(rest):
            if turn.role != ("user", "assistant")[number % 2]:
                raise BadLine("roles do not alternate", f"a turn of the {turn.role} out of place")
        return [
            (f"{system + ' ' if number == 0 else ''}USER: {user.text} ASSISTANT:", answer.text)
            for number, (user, answer) in enumerate(zip(rest[::2], rest[1::2], strict=True))
        ]


class ChatTemplate:
    """The Hugging Face tokenizer's own template.

    A template with `{% generation %}` says itself what the assistant's tokens are. Of any other,
    the text of an answer begins after `add_generation_prompt` and ends with the first special token
    after the turn's text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._chat = tokenizer, tokenizer.chat
        self._reserved = _any_of(tokenizer.special)
        self._special = list(tokenizer.special.values())
        source = str(self._chat.chat_template)
        self._marks_answers = re.search(r"\{%-?\s*generation\b", source) is not None
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        _refuse_special(turns, self._reserved)
        if self._marks_answers:
            return self._encode_marked(turns)
        whole = self._render(turns)
        prompts = []
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._render(turns[:number], add_generation_prompt=True)
            after = self._render(turns[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadLine(
                    "the chat template rewrites earlier turns", f"seen at turn {number + 1}"
                )
            self._check_answer(after[len(before) :], turn.text.strip())
            prompts.append(before)
        ids, *parts = self._tokenizer.encode_batch([whole, *prompts])
        tokens = np.array(ids, np.int64)
        special = np.flatnonzero(np.isin(tokens, self._special))
        trained = np.zeros(len(tokens), bool)
        for part in parts:
            _check_prefix(part, ids)
            # The text has none itself, so the first special token ends the answer.
            end = special[np.searchsorted(special, len(part))]
            trained[len(part) : end + 1] = True
        return Encoded(tokens, trained)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        text = self._render(turns, add_generation_prompt=True)
        return self._tokenizer.encode_batch([text])[0]

    def _encode_marked(self, turns: Sequence[Turn]) -> Encoded:
        output: Any = self._apply(
            turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = np.array(output["assistant_masks"], bool)
        if not trained.any():
            raise BadLine("the chat template marks no token as the assistant's")
        return Encoded(np.array(output["input_ids"], np.int64), trained)

    def _render(self, turns: Sequence[Turn], **options: Any) -> str:
        return str(self._apply(turns, tokenize=False, **options))

    def _apply(self, turns: Sequence[Turn], **options: Any) -> Any:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        try:
            return self._chat.apply_chat_template(messages, **options)
        except Exception as error:  # jinja's, and whatever a template runs into
            raise BadLine("refused by the chat template", str(error)) from None

    def _check_answer(self, rendered: str, answer: str) -> None:
        place = rendered.find(answer)
        if place < 0:
            raise BadLine("the chat template changes the assistant's text")
        if not self._reserved.search(rendered, place + len(answer)):
            raise BadLine("the chat template ends an answer with no special token")


def _check_prefix(part: list[int], whole: list[int]) -> None:
    if whole[: len(part)] != part:
        pairs = enumerate(zip(part, [*whole, -1], strict=False), 1)
        place = next(number for number, (ours, theirs) in pairs if ours != theirs)
        raise BadLine("a token spans the border of an answer", f"token {place}")


def _any_of(special: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest special token; nothing if there are none."""
    tokens = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)) if tokens else r"(?!)")


def _refuse_special(turns: Sequence[Turn], reserved: re.Pattern[str]) -> None:
    """Text that reads as a special token would end turns where there is no end."""
    for number, turn in enumerate(turns, 1):
        if found := reserved.search(turn.text):
            raise BadLine("special token in the text", f"{found.group()!r} in turn {number}")
