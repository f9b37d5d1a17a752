"""JSON Lines to Megatron's .bin/.idx, one pair per domain, shuffled, with held-out documents.

    python tools/preprocess_data.py --input code=code/*.jsonl.gz wiki=wiki.jsonl.zst \
        --output data/tokens --tokenizer path/to/tokenizer.model
"""


def main() -> None:
    import tyro

    from megatron_ext.data.preprocess import PreprocessOptions, preprocess

    preprocess(tyro.cli(PreprocessOptions))


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone too

    from megatron_ext.errors import run_main

    run_main(main)
