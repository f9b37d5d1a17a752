"""Conversations in JSON Lines, in the forms people have, as one: a list of turns.

{"messages": [{"role": "user", "content": "..."}, ...]}
{"conversations": [{"from": "human", "value": "..."}, ...], "system_prompt": "..."}    ShareGPT
{"instruction": "...", "input": "...", "output": "..."}                                Alpaca
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from megatron_ext.data.jsonl import BadLine, parse_record, utf8

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class Turn(NamedTuple):
    role: Role
    text: str


def parse_conversation(line: bytes) -> tuple[list[Turn], bytes]:
    """The turns of one line up to the last of the assistant's, and their UTF-8.

    What follows the assistant's last turn is left out: nothing could be learned from it.

    Raises:
        BadLine: the line is none of the three forms, a role is not known, a turn is empty or no
            string, or there is no turn of the assistant.
    """
    record = parse_record(line)
    if "messages" in record:
        turns = _turns(record["messages"], "messages")
    elif "conversations" in record:
        turns = _turns(record["conversations"], "conversations")
    elif "instruction" in record and "output" in record:
        turns = _alpaca(record)
    else:
        raise BadLine(
            "no conversation",
            "neither 'messages', nor 'conversations', nor 'instruction' and 'output' among "
            f"{sorted(record)[:8]}",
        )
    for key in ("system_prompt", "system"):
        if record.get(key):
            if turns and turns[0].role == "system":
                raise BadLine("two system prompts", f"{key!r} and the first turn")
            turns.insert(0, Turn("system", _text(record, key, "the record")))
    if not turns:
        raise BadLine("no turns")
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    if last < 0:
        raise BadLine("no assistant turn")
    turns = turns[: last + 1]
    return turns, utf8("\0".join(part for turn in turns for part in turn))


def _turns(messages: Any, key: str) -> list[Turn]:
    """Turns of a list of {role, content} or {from, value}."""
    if not isinstance(messages, list):
        raise BadLine("not a list", f"{key!r} is a {type(messages).__name__}")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadLine("not an object", f"turn {number} is a {type(message).__name__}")
        speaker, content = ("from", "value") if "from" in message else ("role", "content")
        role = message.get(speaker)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise BadLine("unknown role", f"{role!r} of turn {number}; known: {', '.join(_ROLES)}")
        turns.append(Turn(_ROLES[role.lower()], _text(message, content, f"turn {number}")))
    return turns


def _alpaca(record: Mapping[str, Any]) -> list[Turn]:
    question = _text(record, "instruction", "the record")
    if record.get("input"):
        question += "\n\n" + _text(record, "input", "the record")
    return [Turn("user", question), Turn("assistant", _text(record, "output", "the record"))]


def _text(holder: Mapping[str, Any], key: str, where: str) -> str:
    if key not in holder:
        raise BadLine("missing key", f"no {key!r} in {where}")
    text = holder[key]
    if not isinstance(text, str):
        raise BadLine("not a string", f"{key!r} of {where} is a {type(text).__name__}")
    if not text or text.isspace():
        raise BadLine("empty turn", f"{key!r} of {where} is empty or blank")
    return text
