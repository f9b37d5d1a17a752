#!/usr/bin/env bash
# Start a training on this node, with one rank per GPU (or RANKS_PER_NODE ranks).
#
# One node:
#     examples/launch/torchrun.sh pretrain_moe.py --config RECIPE --load MOE --save RUN
# Two nodes without SLURM, the same line on each; the first one's name or address is MASTER_ADDR:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host-a examples/launch/torchrun.sh pretrain_moe.py ...
#     NNODES=2 NODE_RANK=1 MASTER_ADDR=host-a examples/launch/torchrun.sh pretrain_moe.py ...
# Under SLURM, examples/slurm/train.sbatch starts it on every node.
#
# SIGUSR1, SIGTERM or Ctrl-C to this script: the ranks save a checkpoint and end. The same command
# again goes on from there.
set -euo pipefail

NNODES="${NNODES:-1}"
NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}" # SLURM numbers its nodes along the network's topology
MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"
RANKS_PER_NODE="${RANKS_PER_NODE:-gpu}"      # gpu: as many as there are GPUs
PYTHON="${PYTHON:-python}"
LOG_DIR="${LOG_DIR:-}"                       # a folder: each rank's output goes to a file there too

fail() {
    printf 'error: %s\n  -> %s\n' "$1" "$2" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no program named" "examples/launch/torchrun.sh pretrain_moe.py --config RECIPE ..."
command -v pkill >/dev/null || fail "pkill is missing, signals would not reach the ranks" \
    "install procps"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
program="$1"
shift
[ -f "$root/$program" ] || fail "$root/$program does not exist" "name pretrain_moe.py or finetune_moe.py"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Ranks share the cores by themselves (--threads); set, torchrun does not warn about it.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Kernels start in the order of their launch: megatron-core's overlap of tensor-parallel communication
# with computation relies on it on A100 and H100.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Uneven expert loads ask for blocks of ever new sizes: growing segments keep memory from
# fragmenting.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# Where torchrun itself is told to end, it gives the ranks 5 minutes to save instead of 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"

options=(--nproc-per-node "$RANKS_PER_NODE")
if [ "$NNODES" -gt 1 ]; then
    # Static: ranks follow the order of the nodes, and no host name has to match.
    options+=(--nnodes "$NNODES" --node-rank "$NODE_RANK")
    options+=(--master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
    options+=(--standalone)
fi
if [ -n "$LOG_DIR" ]; then
    mkdir -p "$LOG_DIR/node$NODE_RANK"
    options+=(--log-dir "$LOG_DIR/node$NODE_RANK" --tee 3 --local-ranks-filter 0)
fi

# torchrun does not pass SIGUSR1 on, it dies of it. It is started deaf to it, as are the ranks until
# they listen for it themselves, and the signals go to the ranks, torchrun's children.
forward() {
    trap '' "$1"
    pkill "-$1" -P "$agent" || true
    # shellcheck disable=SC2064  # which signal it was is known now
    trap "forward $1" "$1"
}
(
    trap '' USR1
    exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$root/$program" "$@"
) &
agent=$!
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064
    trap "forward $name" "$name"
done

# A signal ends `wait` before the ranks have saved: wait until they are gone.
while true; do
    status=0
    wait "$agent" || status=$?
    kill -0 "$agent" 2>/dev/null || exit "$status"
done
