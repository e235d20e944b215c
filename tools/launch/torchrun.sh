#!/bin/sh
# Trains a recipe on several machines. The same command on each, but for NODE_RANK:
#
#   NODES=2 NODE_RANK=0 MASTER=node0 sh tools/launch/torchrun.sh recipes/llama3_8b_32k_longred_c.yaml
#   NODES=2 NODE_RANK=1 MASTER=node0 sh tools/launch/torchrun.sh recipes/llama3_8b_32k_longred_c.yaml
#
# NODES      machines (default 1)
# NODE_RANK  this one's number, from 0 (default 0)
# MASTER     name or address of machine 0, as the others reach it (default 127.0.0.1)
# PORT       a free port on it (default 29500)
# RANKS      ranks on each machine (default: its GPUs, or 1 without any)
# PYTHON     interpreter with the project installed (default: .venv's, or python)
# INTERFACE  network interface over which the ranks talk (default: NCCL and gloo choose)
#
# Whatever follows goes to the training command: overrides such as training.steps=100, or --help.
# The environment is checked first, over all ranks: tools/launch/check_environment.py.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=tools/launch/environment.sh
. "$root/tools/launch/environment.sh"

if [ $# -eq 0 ]; then
    sed -n '2,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$root/.venv/bin/python" ]; then PYTHON="$root/.venv/bin/python"; else PYTHON=python; fi
fi
if [ -z "${RANKS:-}" ]; then
    RANKS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)
    [ "$RANKS" -gt 0 ] || RANKS=1
fi

# Tried first, on the machine that will listen on it: torchrun says it in pages.
try_port='
import socket, sys
try:
    socket.create_server(("", int(sys.argv[1])))
except (OSError, ValueError, OverflowError):
    sys.exit(f"error: PORT {sys.argv[1]}: is in use on this machine, or no port; set PORT to a free one everywhere")'
[ "${NODE_RANK:-0}" != 0 ] || "$PYTHON" -c "$try_port" "${PORT:-29500}" || exit 2

launch() {
    "$PYTHON" -m torch.distributed.run \
        --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$RANKS" \
        --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" "$@"
}

launch "$root/tools/launch/check_environment.py"
launch -m longred_megatron.train "$@"
