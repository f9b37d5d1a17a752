"""Installed packages against what pyproject.toml asks for, and what the missing ones cost."""

from __future__ import annotations

import os
import platform as interpreter
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from megatron_ext.doctor.finding import Finding, Severity
from megatron_ext.versions import installed

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

OPTIONAL = {
    "accelerate": "transformers loads and compares large models more slowly",
    "gguf": "GGUF files cannot be read",
    "matplotlib": "no pictures",
    "pymetis": "partition --method co_activation does not work",
    "sentencepiece": "tokenizers in SentencePiece's format cannot be read",
    "wandb": "no curves in Weights & Biases; metrics.jsonl is written anyway",
    "zstandard": "*.zst files cannot be read",
}
"""Dependencies that a training does without."""

GPU_ONLY = {
    "transformer-engine": (
        "layers run on plain torch: experts one after another instead of one grouped GEMM, no "
        "fused attention, permutation or SwiGLU, no fp8, and every data-parallel rank keeps the "
        "whole optimizer state (12 bytes a parameter). pip install -e '.[gpu]'"
    ),
    "apex": (
        "weight gradients are not added up inside the matrix product: one more pass over them "
        "per micro-batch"
    ),
    "flash-attn": "TransformerEngine uses cuDNN's fused attention instead; rarely slower",
}
"""Packages that only CUDA machines use."""


def check_requirement(line: str) -> Finding | None:
    """An entry of pyproject's dependencies; None where it is for another interpreter."""
    wanted = Requirement(line)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return None
    found = installed(wanted.name)
    if found is None:
        if wanted.name in OPTIONAL:
            return Finding(wanted.name, "missing", Severity.LIMITS, OPTIONAL[wanted.name])
        return Finding(wanted.name, "missing", Severity.STOPS, f"pip install '{line}'")
    if not wanted.specifier.contains(found, prereleases=True):
        return Finding(
            wanted.name,
            f"{found}, not {wanted.specifier}",
            Severity.LIMITS,
            f"never tested together: pip install '{wanted.name}{wanted.specifier}'",
        )
    return Finding(wanted.name, found)


def check_packages() -> list[Finding]:
    """The interpreter and every dependency."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    version = interpreter.python_version()
    if Requirement(f"python{project['requires-python']}").specifier.contains(version):
        findings = [Finding("Python", version)]
    else:
        asked = project["requires-python"]
        findings = [Finding("Python", f"{version}, not {asked}", Severity.STOPS)]
    checked = (check_requirement(line) for line in project["dependencies"])
    return findings + [finding for finding in checked if finding is not None]


def check_gpu_packages() -> list[Finding]:
    """TransformerEngine, Apex and flash-attn, where there are GPUs to use them."""
    findings = []
    for name, cost in GPU_ONLY.items():
        found = installed(name)
        if found is not None:
            findings.append(Finding(name, found))
        else:
            slower = Severity.FINE if name == "flash-attn" else Severity.LIMITS
            findings.append(Finding(name, "missing", slower, cost))
    return findings


def check_torch(gpus: int) -> list[Finding]:
    """Whether torch can use the GPUs that the driver shows: CUDA and NCCL versions."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        return [
            Finding(
                "torch and the GPUs",
                f"torch {torch.__version__} (built for {built}) sees none of {gpus}",
                Severity.STOPS,
                "install a torch for this driver's CUDA, and look at CUDA_VISIBLE_DEVICES="
                f"{os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')}",
            )
        ]
    seen = torch.cuda.device_count()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        Finding("CUDA of torch", torch.version.cuda or "?"),
        Finding("NCCL", nccl),
        Finding(
            "GPUs that torch sees",
            str(seen),
            Severity.FINE if seen >= gpus else Severity.STOPS,
            "" if seen >= gpus else "look at CUDA_VISIBLE_DEVICES and at what the job asked for",
        ),
    ]
