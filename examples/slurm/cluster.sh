# shellcheck shell=bash disable=SC2034
# What differs from cluster to cluster, in one place: adapt it once. A value that is already in the
# environment wins. Source it before sbatch, from the repository's root, so that sbatch knows
# partition and account; the scripts source it again on the nodes:
#
#     source examples/slurm/cluster.sh
#     sbatch --nodes 16 examples/slurm/train.sbatch pretrain_moe.py --config ... --load ... --save ...

# --- what sbatch asks for ---------------------------------------------------------------------------
: "${GPUS_PER_NODE:=8}"       # 0: CPU nodes
: "${RANKS_PER_NODE:=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1))}"
: "${PARTITION:=}"            # empty: the cluster's default
: "${ACCOUNT:=}"
: "${QOS:=}"
[ -z "$PARTITION" ] || export SBATCH_PARTITION="$PARTITION"
[ -z "$ACCOUNT" ] || export SBATCH_ACCOUNT="$ACCOUNT"
[ -z "$QOS" ] || export SBATCH_QOS="$QOS"
[ "$GPUS_PER_NODE" -eq 0 ] || export SBATCH_GPUS_PER_NODE="$GPUS_PER_NODE"

# --- where Python is --------------------------------------------------------------------------------
: "${CONTAINER:=none}"        # none | pyxis | apptainer
: "${IMAGE:=}"                # pyxis: a .sqsh file or REGISTRY#NAME:TAG; apptainer: a .sif file
: "${MOUNTS:=$PWD}"           # folders with code, data and checkpoints, separated by commas: they
                              # keep their paths inside the container
: "${PYTHON:=python}"         # none: the environment's, e.g. /shared/venv/bin/python

# --- what a node must have before a training starts -------------------------------------------------
: "${MIN_SHM_GB:=1}"          # /dev/shm, which NCCL uses between the GPUs of a node
: "${MIN_TMP_GB:=5}"          # the local /tmp
: "${MIN_SAVE_GB:=100}"       # free where checkpoints go: 7B parameters with optimizer take 95 GB
: "${ACTIVE_IB_PORTS:=0}"     # InfiniBand/RoCE ports that must be up; 0: not checked
: "${DRAIN_BAD_NODES:=no}"    # yes: drain a node that fails and queue the job again (needs operator
                              # rights); no: fail with the node's name

# --- the network ------------------------------------------------------------------------------------
# Rendezvous is on the job's first node. If its host name leads to a slow or closed network for the
# others, put the name or address of the right one here.
: "${MASTER_ADDR:=}"
: "${IB_HCA:=}"               # which adapters carry the GPUs' traffic, e.g. mlx5_0,mlx5_1: needed
                              # where a node also has adapters for storage
: "${SOCKET_IFNAME:=}"        # interface of the start-up and of gloo's traffic, e.g. ib0, eth0,
                              # ^docker0,lo: needed where NCCL or gloo picks one that leads nowhere
[ -z "$IB_HCA" ] || export NCCL_IB_HCA="$IB_HCA"
[ -z "$SOCKET_IFNAME" ] || export NCCL_SOCKET_IFNAME="$SOCKET_IFNAME"
# gloo takes one interface by name and no pattern.
case "$SOCKET_IFNAME" in '' | *[,^]*) ;; *) export GLOO_SOCKET_IFNAME="$SOCKET_IFNAME" ;; esac
# WARN says what failed; INFO also which adapters and rings were chosen (look for NET/IB against
# NET/Socket: the latter means that InfiniBand is not used).
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Exponent of the time after which a lost packet counts as an error: 22 is about 17 s a try, where the
# default gives up too soon on large fabrics during a link's retraining.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"

# --- one line of a study ----------------------------------------------------------------------------
# The words of line SLURM_ARRAY_TASK_ID of a file, as the shell reads them, in the array `words`.
words_of_line() { # FILE
    local line
    line="$(sed -n "${SLURM_ARRAY_TASK_ID:?sbatch --array says which lines of $1 to run}p" "$1")"
    if [ -z "$line" ]; then
        echo "error: $1 has no line $SLURM_ARRAY_TASK_ID" >&2
        echo "  -> sbatch --array 1-$(grep -c '' "$1")" >&2
        exit 2
    fi
    eval "words=($line)"
}

# --- entering the container -------------------------------------------------------------------------
# srun OPTIONS... -- COMMAND... with the command inside the container.
srun_inside() {
    local options=()
    while [ "$1" != -- ]; do
        options+=("$1")
        shift
    done
    shift
    if [ "$CONTAINER" != none ] && [ -z "$IMAGE" ]; then
        echo "error: CONTAINER=$CONTAINER without an image" >&2
        echo "  -> set IMAGE in examples/slurm/cluster.sh" >&2
        exit 2
    fi
    case "$CONTAINER" in
        none) exec srun "${options[@]}" "$@" ;;
        pyxis)
            local pairs
            pairs="$(printf '%s' "$MOUNTS" | sed 's/[^,]*/&:&/g')"
            exec srun "${options[@]}" --container-image="$IMAGE" --container-mounts="$pairs" \
                --container-workdir="$PWD" --no-container-mount-home "$@"
            ;;
        apptainer) exec srun "${options[@]}" apptainer exec --nv --bind "$MOUNTS" "$IMAGE" "$@" ;;
        *)
            echo "error: CONTAINER=$CONTAINER is none of none, pyxis, apptainer" >&2
            exit 2
            ;;
    esac
}
