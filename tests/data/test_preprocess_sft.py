"""JSON Lines of conversations to tokens and masks on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.chats import CHATML, LLAMA3, TALK, WITH_SYSTEM, messages, save_chat_tokenizer
from data.corpora import contents, options, read

from megatron_ext.data.conversation_stream import ConversationStream
from megatron_ext.data.conversations import Turn, parse_conversation
from megatron_ext.data.jsonl import BadLine
from megatron_ext.data.preprocess import preprocess
from megatron_ext.data.templates import load_template
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_tokenizer(tmp_path_factory.mktemp("chat"), CHATML)


def numbered(count: int) -> list[list[Turn]]:
    return [
        [Turn("user", f"Count to {n}."), Turn("assistant", " ".join(map(str, range(n % 17 + 1))))]
        for n in range(count)
    ]


def write(path: Path, talks: list[list[Turn]]) -> Path:
    path.write_text("".join(json.dumps(messages(turns)) + "\n" for turns in talks))
    return path


SAID = [Turn("user", "a"), Turn("assistant", "b")]


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (messages(WITH_SYSTEM), WITH_SYSTEM),
        ({"messages": messages([*SAID, SAID[0]])["messages"], "source": "x"}, SAID),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "system_prompt": "Be brief.",
            },
            [Turn("system", "Be brief."), *SAID],
        ),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                ],
                "system_prompt": "",
            },
            [SAID[1], *SAID],
        ),
        ({"instruction": "a", "input": "", "output": "b"}, SAID),
        ({"instruction": "a", "output": "b"}, SAID),
        ({"instruction": "a", "input": "c", "output": "b"}, [Turn("user", "a\n\nc"), SAID[1]]),
    ],
)
def test_forms(record: dict[str, Any], turns: list[Turn]) -> None:
    assert parse_conversation(json.dumps(record).encode())[0] == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no conversation: neither"),
        ({"messages": []}, "no turns"),
        ({"messages": {}}, "not a list"),
        ({"messages": ["a"]}, "not an object: turn 1"),
        (messages(SAID[:1]), "no assistant turn"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown role: 'tool' of turn 1"),
        ({"messages": [{"content": "a"}]}, "unknown role: None"),
        ({"messages": [{"role": "user"}]}, "missing key: no 'content' in turn 1"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "not a string: 'content' of turn 1"),
        (messages([SAID[0], Turn("assistant", " ")]), "empty turn: 'content' of turn 2"),
        ({**messages(WITH_SYSTEM), "system": "x"}, "two system prompts"),
        (messages([Turn("user", "\ud800"), SAID[1]]), "invalid UTF-8"),
        ({"instruction": "a", "output": ""}, "empty turn: 'output'"),
    ],
)
def test_what_is_no_conversation(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadLine, match=reason):
        parse_conversation(json.dumps(record).encode())


@pytest.mark.parametrize("name", ["tokenizer", "vicuna_v1.1"])
def test_round_trip(tmp_path: Path, tokenizer: Path, name: str) -> None:
    talks = [*numbered(300), TALK, WITH_SYSTEM]
    source = write(tmp_path / "talk.jsonl", talks)
    made = preprocess(
        options(tmp_path, tokenizer, str(source), task="sft", template=name, valid_fraction=0.1)
    )
    template = load_template(load_tokenizer(tokenizer), name)  # type: ignore[arg-type]
    expected = sorted(
        (encoded.tokens.tolist(), encoded.trained.tolist())
        for encoded in map(template.encode, talks)
    )
    found = []
    for split in ("train", "valid"):
        prefix = tmp_path / "out" / split / "talk"
        documents = read(prefix)
        mask = np.fromfile(f"{prefix}.mask", np.uint8)
        parts = np.split(mask, np.cumsum([len(document) for document in documents])[:-1])
        found += [(tokens, part.tolist()) for tokens, part in zip(documents, parts, strict=True)]
        summary = made["domains"]["talk"][split]
        assert summary["trained_tokens"] == mask.sum() and summary["tokens"] == len(mask)
        assert summary["documents"] == len(documents) > 10
        stream = ConversationStream(prefix, 256, 0, "talk")
        assert stream.num_tokens == len(mask)
    assert sorted(found) == expected
    assert made["task"] == "sft" and made["template"] == name


def test_same_bytes_for_any_workers_and_after_an_interruption(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import megatron_ext.data.preprocess as module

    whole = module.read_chunks
    monkeypatch.setattr(module, "read_chunks", lambda file, _: whole(file, 2000))
    source = write(tmp_path / "talk.jsonl", numbered(200))
    first = options(tmp_path, tokenizer, str(source), task="sft", workers=1)
    preprocess(first)
    again = dataclasses.replace(first, output=tmp_path / "again", workers=3)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(module, "merge_shards", stop)
        with pytest.raises(KeyboardInterrupt):
            preprocess(again)
    with pytest.raises(UserError, match="unfinished work with another template"):
        preprocess(dataclasses.replace(again, template="vicuna_v1.1"))
    with monkeypatch.context() as idle:
        idle.setattr(module, "_run", stop)  # nothing is left to tokenize
        preprocess(again)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    with pytest.raises(UserError, match="made with another seq_length"):
        preprocess(dataclasses.replace(again, seq_length=100))


def test_a_faulty_line_stops_or_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    source = write(tmp_path / "talk.jsonl", numbered(50))
    lines = source.read_text().splitlines()
    lines[7] = json.dumps(messages(TALK[:1]))
    lines[20] = json.dumps(messages([Turn("user", "<|im_end|>"), TALK[1]]))
    lines[21] = json.dumps(messages(TALK[1:2]))
    source.write_text("\n".join(lines) + "\n")
    strict = options(tmp_path, tokenizer, str(source), task="sft")
    with pytest.raises(UserError, match=r"talk.jsonl, line 8: no assistant turn"):
        preprocess(strict)
    made = preprocess(dataclasses.replace(strict, on_error="skip", output=tmp_path / "skipped"))
    talk = made["domains"]["talk"]
    assert talk["skipped"] == {
        "no assistant turn": 1,
        "refused by the chat template": 1,
        "special token in the text": 1,
    }
    assert [line for _, line, _ in talk["skipped_examples"]] == [8, 21, 22]
    assert sum(talk[split]["documents"] for split in ("train", "valid")) == 47


def test_long_conversations_are_cut_or_left_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long_answer = [Turn("user", "a"), Turn("assistant", "b c " * 200)]
    long_question = [Turn("user", "b c " * 200), Turn("assistant", "a")]
    source = write(tmp_path / "talk.jsonl", [*numbered(20), long_answer, long_question])
    made = preprocess(
        options(tmp_path, tokenizer, str(source), task="sft", seq_length=100, valid_fraction=0.0)
    )
    talk = made["domains"]["talk"]
    assert (talk["cut"], talk["dropped"], talk["train"]["documents"]) == (1, 1, 21)
    assert max(map(len, read(tmp_path / "out" / "train" / "talk"))) == 100
    printed = capsys.readouterr().out
    assert "cut 1 conversations" in printed and "left out 1 conversations" in printed


def test_a_tokenizer_without_a_template_stops_at_once(tmp_path: Path) -> None:
    bare = save_chat_tokenizer(tmp_path / "bare", None)
    source = write(tmp_path / "talk.jsonl", numbered(3))
    with pytest.raises(UserError, match="has no chat template"):
        preprocess(options(tmp_path, bare, str(source), task="sft"))
    other = save_chat_tokenizer(tmp_path / "other", LLAMA3)
    ours, theirs = (load_tokenizer(path) for path in (bare, other))
    assert ours.fingerprint == theirs.fingerprint  # the template is no part of a tokenizer
