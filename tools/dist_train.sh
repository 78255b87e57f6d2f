#!/usr/bin/env bash
# Train on GPUS processes per machine, one GPU each, or on CPU processes (gloo) where there is no GPU.
# On one machine the processes meet at a free port; PORT chooses one.
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and, unless it is 29500, PORT set.
set -euo pipefail

if [ $# -lt 2 ] || ! [[ $2 =~ ^[1-9][0-9]*$ ]]; then
    [ $# -lt 2 ] || echo "error: GPUS must be a number of processes, at least 1, got $2." >&2
    echo "usage: $0 CONFIG GPUS [arguments of tools/train.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2

if [ "${NNODES:-1}" = 1 ] && [ -z "${PORT:-}" ]; then
    MEETING=(--standalone --local_addr=127.0.0.1)
else
    MEETING=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}")
    MEETING+=(--master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
fi

TOOLS=$(dirname "$0")
exec python "$TOOLS/../mmubn/cli/launch.py" "${MEETING[@]}" --nproc_per_node="$GPUS" \
    "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
