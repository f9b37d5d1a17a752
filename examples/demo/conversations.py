"""Five kinds of conversation for instruction tuning, from the half of each source kept for it."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from reading import (
    COOKBOOK,
    RECIPES,
    WIKI,
    Reader,
    Record,
    articles,
    conversation,
    for_chat,
    functions,
    member,
    pick,
    recipes,
    stdlib_files,
)
from sums import KINDS


def coding(_: Path) -> Iterator[Record]:
    for path, source in stdlib_files():
        if for_chat(path):
            for signature, text, body in functions(source):
                ask = f"Write the Python function `{signature}`.\n\n{text}"
                yield conversation(f"stdlib: {path}", ask, f"```python\n{body}\n```")


def cooking(wheel_dir: Path) -> Iterator[Record]:
    for title, ingredients, steps in recipes(member(wheel_dir, COOKBOOK, RECIPES)):
        if for_chat(title):
            need = pick(title, ("What do I need for {}?", "Which ingredients go into {}?"))
            make = pick(title + "?", ("And how do I make it?", "How is it prepared?"))
            turns = (need.format(title), f"You need:\n{ingredients}", make, steps)
            yield conversation(f"Wikibooks Cookbook: {title}", *turns)


def encyclopaedia(
    wheel_dir: Path,
    language: str = "en-us",
    ask: tuple[str, ...] = ("Tell me about {}.", "What do you know about {}?", "Explain: {}"),
) -> Iterator[Record]:
    for title, extract in articles(member(wheel_dir, WIKI, f"data/summaries_{language}.json")):
        if for_chat(title):
            question = pick(title, ask).format(title)
            yield conversation(f"Wikipedia ({language[:2]}): {title}", question, extract)


def encyclopaedia_fr(wheel_dir: Path) -> Iterator[Record]:
    ask = ("Parle-moi de ce sujet : {}.", "Que sais-tu sur « {} » ?", "Explique : {}")
    yield from encyclopaedia(wheel_dir, "fr-fr", ask)


def sums(_: Path) -> Iterator[Record]:
    """School mathematics with the working; every third conversation asks a second question."""
    numbers = random.Random(0)
    for count in itertools.count():
        kind = numbers.choice(KINDS)
        turns = list(kind(numbers))
        if count % 3 == 0:
            question, answer = kind(numbers)
            turns += [f"Now another one: {question}", answer]
        yield conversation(f"generated: {kind.__name__}", *turns)


DATASETS: dict[str, Reader] = {
    "coding": coding,
    "sums": sums,
    "cooking": cooking,
    "encyclopaedia": encyclopaedia,
    "encyclopaedia_fr": encyclopaedia_fr,
}
