"""What a recipe costs on a grid, before it is launched: memory, messages, time.

    python tools/plan.py --config examples/recipes/llama2_7b_2of8_8xa100.yaml --gpu a100
    python tools/plan.py --config RECIPE.yaml --world-size 128 --expert-model-parallel-size 4
    python tools/plan.py --config RECIPE.yaml --world-size 128 --search
    python tools/plan.py --scaling docs/scaling.md

Takes the options of pretrain_moe.py besides its own. Runs on one CPU, for any number of GPUs: the
training step is rehearsed without data. Exit code 3: the recipe does not fit (the nearest grid that
does is named). Speeds are assumptions; nothing was measured on a GPU.
"""

from megatron_ext.errors import run_main


def main() -> int:
    from megatron_ext.planning.command import plan

    return plan(description=__doc__ or "")


if __name__ == "__main__":
    run_main(main)
