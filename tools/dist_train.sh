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

TOOLS=$(dirname "$0")
. "$TOOLS/launch.sh"
launch "$GPUS" "$TOOLS/train.py" "$CONFIG" --launcher pytorch "${@:3}"
