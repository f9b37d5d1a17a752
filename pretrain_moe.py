"""Continue the pre-training of a LLaMA-MoE (or of a dense LLaMA) on blended domains.

On a laptop: python pretrain_moe.py --load MOE --data-dir DATA --save RUN --seq-length 256

On a node: torchrun --nproc-per-node 8 pretrain_moe.py --config recipe.yaml
"""

from megatron_ext.errors import run_main


def main() -> int:
    from megatron_ext.recipe import parse_run

    run = parse_run(description=__doc__ or "")

    from megatron_ext.training.run import train

    train(run)
    return 0


if __name__ == "__main__":
    run_main(main)
