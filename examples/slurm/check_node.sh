#!/usr/bin/env bash
# Is this node fit for a training? Prints what is wrong with it and ends with 1, or "ok" with 0.
# train.sbatch runs it on every node, outside the container; the limits are in cluster.sh.
set -uo pipefail

problems=()

free_gb() { df --output=avail -BG "$1" 2>/dev/null | tail -1 | tr -dc '0-9'; }

room() { # FOLDER GIGABYTES
    local free
    free="$(free_gb "$1")"
    [ -n "$free" ] || problems+=("$1 cannot be read")
    [ -z "$free" ] || [ "$free" -ge "$2" ] || problems+=("$1 has $free of $2 GB free")
}

if [ "$GPUS_PER_NODE" -gt 0 ]; then
    # A GPU that fell off the bus is missing in the list, or makes nvidia-smi hang.
    if ! list="$(timeout 60 nvidia-smi --query-gpu=index,ecc.errors.uncorrected.volatile.total \
        --format=csv,noheader,nounits 2>&1)"; then
        problems+=("nvidia-smi failed: ${list:-no answer in 60 s}")
    else
        found="$(printf '%s\n' "$list" | grep -c '^[0-9]')"
        [ "$found" -ge "$GPUS_PER_NODE" ] || problems+=("$found of $GPUS_PER_NODE GPUs")
        while IFS=', ' read -r index errors; do
            # Cards without ECC answer [N/A].
            [[ "$errors" =~ ^[1-9] ]] && problems+=("GPU $index: $errors uncorrected memory errors")
        done <<<"$list"
    fi
fi
room /dev/shm "$MIN_SHM_GB"
room /tmp "$MIN_TMP_GB"
room "$SAVE" "$MIN_SAVE_GB"
if [ "$ACTIVE_IB_PORTS" -gt 0 ]; then
    active="$(cat /sys/class/infiniband/*/ports/*/state 2>/dev/null | grep -c ACTIVE)"
    [ "$active" -ge "$ACTIVE_IB_PORTS" ] ||
        problems+=("$active of $ACTIVE_IB_PORTS InfiniBand ports active")
fi

if [ "${#problems[@]}" -gt 0 ]; then
    (IFS=';' && echo "unfit: ${SLURMD_NODENAME:-$(hostname)}: ${problems[*]}")
    exit 1
fi
echo "ok: ${SLURMD_NODENAME:-$(hostname)}"
