#!/usr/bin/env bash
# torchrun, started on every host, with its own NODE_RANK (from 0) and the same HEAD (address of the first host):
#
#   NODES=2 NODE_RANK=1 HEAD=node-1 examples/launch/torchrun.sh [FURTHER OPTIONS OF pretrain.py]
#
# If a rank fails, the other ranks of its host end at once, and those of other hosts within seconds.
set -euo pipefail

NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
GPUS=${GPUS:-8} # per host
HEAD=${HEAD:-127.0.0.1}
PORT=${PORT:-} # of the first host; unset: a free one on a single host, else 29500
CONFIG=${CONFIG:-examples/bipe_rope_151m.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$NODES" = 1 ] && [ -z "$PORT" ]; then
    rendezvous=(--standalone)
else
    PORT=${PORT:-29500}
    listen='import socket, sys; socket.create_server(("", int(sys.argv[1])))'
    if [ "$NODE_RANK" = 0 ] && ! python -c "$listen" "$PORT" 2>/dev/null; then
        echo "port $PORT of this host cannot be used, perhaps because of another launch: set PORT on all hosts" >&2
        exit 2
    fi
    rendezvous=(--nnodes "$NODES" --node-rank "$NODE_RANK" --master-addr "$HEAD" --master-port "$PORT")
fi

exec torchrun "${rendezvous[@]}" --nproc-per-node "$GPUS" \
    pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
