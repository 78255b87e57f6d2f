# For dist_train.sh and dist_test.sh, which source it. launch GPUS SCRIPT [arguments]: run a Python script in GPUS
# processes per machine. On one machine they meet at a free port, unless PORT chooses one.
launch() {
    local meeting=(--standalone --local_addr=127.0.0.1)
    if [ "${NNODES:-1}" != 1 ] || [ -n "${PORT:-}" ]; then
        meeting=(--nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}")
        meeting+=(--master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}")
    fi
    local script=$TOOLS/../mmubn/cli/launch.py            # of a clone
    [ -e "$script" ] || script=$TOOLS/../../cli/launch.py # of an installation, which has the tools in mmubn/.mim
    exec python "$script" "${meeting[@]}" --nproc_per_node="$1" "${@:2}"
}
