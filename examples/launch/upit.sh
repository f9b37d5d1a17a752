#!/usr/bin/env bash
# UpIT from a dense model and conversations to a tuned mixture that transformers reads.
#
#     MODEL=SmolLM2 DATA=talks OUT=upit examples/launch/upit.sh
#
# MODEL is a Hugging Face directory or a GGUF file; DATA is written by tools/preprocess_data.py
# --task sft with MODEL's tokenizer. Below OUT:
#
#     dense    the model as a checkpoint                        convert_llama.py import
#     sft      its instruction tuning; what it saves            finetune_moe.py --config SFT_RECIPE
#     experts  these as experts, and merged ones                convert_llama.py upit
#     routed   with routers trained on a part of the data       initialise_router.py
#     moe      the mixture's instruction tuning                 finetune_moe.py --config MOE_RECIPE
#     hf       MixtralForCausalLM                               convert_llama.py export
#
# The same command again goes on where it was stopped: what is complete is not made again, and runs
# go on from their last checkpoint. Delete a folder to have it made again, and those after it.
# On one node; the runs take RANKS ranks, one per GPU unless it says otherwise.
set -euo pipefail

fail() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

for name in MODEL DATA OUT; do
    [ -n "${!name:-}" ] || fail "$name is not set" "MODEL=... DATA=... OUT=... examples/launch/upit.sh"
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
recipes="$root/examples/recipes"
SFT_RECIPE="${SFT_RECIPE:-$recipes/upit_sft.yaml}" # saves the checkpoints that become experts
MOE_RECIPE="${MOE_RECIPE:-$recipes/upit_moe.yaml}"
EXPERTS="${EXPERTS:-8}"
TOPK="${TOPK:-2}"
ITERATIONS="${ITERATIONS:-all}" # of sft; those of its second half alone were worse in the paper
# Further options of each step, as words.
SFT_OPTIONS="${SFT_OPTIONS:-}"
UPIT_OPTIONS="${UPIT_OPTIONS:-}"
ROUTER_OPTIONS="${ROUTER_OPTIONS:-}"
MOE_OPTIONS="${MOE_OPTIONS:-}"
export PYTHON="${PYTHON:-python}" RANKS_PER_NODE="${RANKS:-gpu}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# A step whose folder appears when it is complete.
make_once() {
    local folder="$OUT/$1"
    shift
    [ -d "$folder" ] || "$@"
}

# A run, until its last checkpoint is that of the last step.
run_once() {
    local run="$OUT/$1"
    shift
    is_finished "$run" || "$root/examples/launch/torchrun.sh" "$@"
    is_finished "$run" || fail "$run is not finished" "the same command goes on with it"
}

is_finished() {
    local latest goal
    latest="$(cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null)" || return 1
    goal="$(sed -n 's/^ *train_iters: *//p' "$1/recipe.yaml")"
    [ "$latest" -ge "$goal" ]
}

convert() { "$PYTHON" "$root/tools/convert_llama.py" "$@"; }

mkdir -p "$OUT"
read -ra sft <<<"$SFT_OPTIONS"
read -ra upit <<<"$UPIT_OPTIONS"
read -ra router <<<"$ROUTER_OPTIONS"
read -ra moe <<<"$MOE_OPTIONS"

make_once dense convert import --source "$MODEL" --output "$OUT/dense"
run_once sft finetune_moe.py --config "$SFT_RECIPE" --load "$OUT/dense" --data-dir "$DATA" \
    --save "$OUT/sft" "${sft[@]}"
make_once experts convert upit --base "$OUT/dense" --source "$OUT/sft" --iterations "$ITERATIONS" \
    --num-experts "$EXPERTS" --moe-router-topk "$TOPK" --output "$OUT/experts" "${upit[@]}"
make_once routed "$root/examples/launch/torchrun.sh" tools/initialise_router.py \
    --load "$OUT/experts" --data-dir "$DATA" --save "$OUT/routed" "${router[@]}"
run_once moe finetune_moe.py --config "$MOE_RECIPE" --load "$OUT/routed" --data-dir "$DATA" \
    --save "$OUT/moe" "${moe[@]}"
make_once hf convert export --source "$OUT/moe" --output "$OUT/hf"
printf 'done: %s\n' "$OUT/hf"
