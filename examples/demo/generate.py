"""Text and perplexity from an exported model, through Hugging Face transformers alone.

    python examples/demo/generate.py --model demo/moe-hf --data demo/tokens/valid/wiki > read.json

Greedy, so that the same weights give the same text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import run_main


@dataclass
class Options:
    model: Path
    """Hugging Face directory."""
    prompts: tuple[str, ...] = (
        "Preheat the oven to",
        "La ville est située dans le département",
    )
    """Beginnings that the model goes on from."""
    max_new_tokens: int = 40
    """Length of a continuation."""
    data: Path | None = None
    """Prefix of a held-out .bin/.idx pair whose perplexity is measured."""
    seq_length: int = 256
    """Tokens in a held-out sample."""
    samples: int = 16
    """Held-out samples."""


def main() -> None:
    import json
    import math
    import sys

    import torch
    import tyro
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_ext.data.stream import TokenStream

    options = tyro.cli(Options, description=__doc__)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    texts: dict[str, str] = {}
    result: dict[str, Any] = {"architecture": type(model).__name__, "texts": texts}
    with torch.no_grad():
        for prompt in tqdm(options.prompts, desc="generating", unit="text"):
            inputs = tokenizer(prompt, return_tensors="pt")
            output = model.generate(
                **inputs, max_new_tokens=options.max_new_tokens, do_sample=False
            )[0]
            text = str(tokenizer.decode(output, skip_special_tokens=True))
            texts[prompt] = text[len(prompt) :]
            print(f"  {text}", file=sys.stderr)
        if options.data:
            stream = TokenStream(options.data, options.seq_length, 0, options.data.name)
            total = 0.0
            for index in tqdm(range(options.samples), desc="perplexity", unit="sample"):
                row = torch.from_numpy(stream.read(index).astype("int64"))
                logits = model(row[None, :-1]).logits[0]
                total += float(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
            result["data"] = options.data.name
            result["perplexity"] = math.exp(total / options.samples)
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
