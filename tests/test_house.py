"""The house is in order: what the texts promise exists, and the tree keeps its own rules."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

MAX_LINES = 400
# Longer files, each with the reason why it is not cut in two.
LONG_FILES: dict[str, str] = {}
COUNTED = {".py", ".sh", ".sbatch", ".yaml", ".yml", ".toml", ".md"}

# Places that exist on one machine only. Dockerfiles may name root's home: it is the image's own.
LOCAL_PATH = re.compile(r"(?<![\w./-])/(?:work|root|home/\w+|Users/\w+|tmp/venvs)(?:/|\b)")


def repository_files() -> list[Path]:
    """The files that are, or are about to be, under version control."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so which files belong to the project is not known")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def code_in(markdown: str) -> str:
    """The fenced and indented blocks and the inline code of a Markdown text."""
    fenced = re.findall(r"^```.*?^```", markdown, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}.*$", markdown, flags=re.MULTILINE)
    inline = re.findall(r"`[^`\n]+`", markdown)
    return "\n".join(fenced + indented + inline)


def markdown_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".md"]


def test_every_make_command_in_the_texts_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w%-]*):(?!=)", makefile, flags=re.MULTILINE))
    assert {"demo", "test", "lint", "bench-%"} <= targets
    unknown = []
    commands = 0
    for path in markdown_files():
        for command in re.findall(r"\bmake ([a-z][\w-]*)", code_in(path.read_text())):
            commands += 1
            benchmark = command.removeprefix("bench-")
            if benchmark != command:  # in capitals it stands for any name
                known = benchmark.isupper() or (ROOT / "benchmarks" / f"{benchmark}.py").is_file()
            else:
                known = command in targets
            if not known:
                unknown.append(f"{relative(path)}: make {command}")
    assert commands and not unknown, unknown


def test_links_between_texts_resolve() -> None:
    broken = []
    links = 0
    for path in markdown_files():
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:|#", target):
                continue
            links += 1
            if not (path.parent / target.partition("#")[0]).exists():
                broken.append(f"{relative(path)}: {target}")
    assert links and not broken, broken


def test_the_readme_names_only_what_is_there() -> None:
    table = re.findall(r"^\| `([^`]+)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(table) >= 10
    assert [name for name in table if not (ROOT / name).exists()] == []


def test_no_file_names_a_place_on_one_machine() -> None:
    found = []
    for path in repository_files():
        text = text_of(path)
        if text is None or path.name.startswith("Dockerfile"):
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if match := LOCAL_PATH.search(line):
                found.append(f"{relative(path)}:{number}: {match.group()}")
    assert not found, found


@pytest.mark.parametrize(
    ("line", "is_local"),
    [
        ("cd /" + "work/main", True),
        ("'/" + "root/.cache'", True),
        ("/" + "home/ada/models", True),
        ("https://example.org/work/paper", False),
        ("/workspace/run", False),
        ("/home/$USER/runs", False),
        ("data/root/x", False),
    ],
)
def test_local_paths_are_recognised(line: str, is_local: bool) -> None:
    assert bool(LOCAL_PATH.search(line)) == is_local


def test_the_licence_is_whole() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {
        relative(path): len(path.read_text().splitlines())
        for path in repository_files()
        if path.suffix in COUNTED or path.name in {"Makefile", "Dockerfile"}
    }
    too_long = {name for name, length in lengths.items() if length > MAX_LINES}
    assert too_long == set(LONG_FILES), "cut the file in two, or keep LONG_FILES right"
    assert all(LONG_FILES.values()), "a long file needs its reason"
