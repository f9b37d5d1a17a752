"""Tune a LLaMA-MoE (or a dense LLaMA) on conversations, with weights that may follow the routers.

On a laptop: python finetune_moe.py --load MOE --data-dir DATA --save RUN --seq-length 512

On a node: torchrun --nproc-per-node 8 finetune_moe.py --config examples/recipes/moe_sft.yaml

Takes the options of pretrain_moe.py. DATA is written by tools/preprocess_data.py --task sft, MOE is
a converted checkpoint or a pre-training run, of which the weights are taken.
"""

from megatron_ext.errors import run_main


def main() -> int:
    from megatron_ext.recipe import parse_run

    run = parse_run(description=__doc__ or "", defaults={"data": {"task": "sft"}})
    run.checkpoint.finetune = True  # a run in `save` is resumed all the same

    from megatron_ext.training.run import train

    train(run)
    return 0


if __name__ == "__main__":
    run_main(main)
