#!/usr/bin/env bash
# Several machines, listed in a file, started by DeepSpeed over ssh from one of them:
#
#   HOSTFILE=my_hosts examples/launch/hostfile.sh [FURTHER OPTIONS OF pretrain.py]
#
# Needs pdsh here, ssh without a password to every host, and this folder, its .venv, the data and the run folder under
# the same path on all of them. Variables that begin with NCCL and PYTHON are exported; list others in a file
# .deepspeed_env in this folder, one NAME=VALUE per line. If ssh is not allowed, start it on every host with
# LAUNCHER_OPTIONS="--no_ssh --node_rank 0" (1, 2, ... by the line of the host) and HEAD set.
set -euo pipefail

HOSTFILE=${HOSTFILE:-examples/launch/hostfile}
HEAD=${HEAD:-} # address of the first host; empty: DeepSpeed asks it
PORT=${PORT:-29500} # of the first host
CONFIG=${CONFIG:-examples/bipe_rope_1.6b.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
LAUNCHER_OPTIONS=${LAUNCHER_OPTIONS:-}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck disable=SC2086 # options are several words
exec deepspeed --hostfile "$HOSTFILE" --master_addr "$HEAD" --master_port "$PORT" $LAUNCHER_OPTIONS \
    pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
