#!/usr/bin/env bash
# Evaluate a checkpoint on GPUS processes per machine, one GPU each, or on CPU processes (gloo) where there is no GPU.
# On one machine the processes meet at a free port; PORT chooses one.
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and, unless it is 29500, PORT set.
set -euo pipefail

if [ $# -lt 3 ] || ! [[ $3 =~ ^[1-9][0-9]*$ ]]; then
    [ $# -lt 3 ] || echo "error: GPUS must be a number of processes, at least 1, got $3." >&2
    echo "usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]" >&2
    exit 2
fi
CONFIG=$1
CHECKPOINT=$2
GPUS=$3

TOOLS=$(dirname "$0")
. "$TOOLS/launch.sh"
launch "$GPUS" "$TOOLS/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "${@:4}"
