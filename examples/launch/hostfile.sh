#!/usr/bin/env bash
# Several machines, listed in a file, started by DeepSpeed over ssh from one of them:
#
#   HOSTFILE=my_hosts examples/launch/hostfile.sh [FURTHER OPTIONS OF pretrain.py]
#
# Needs pdsh here, ssh without a password to every host, and this folder, its .venv, the data and the run folder under
# the same path on all of them. If ssh is not allowed, start it on every host with
# LAUNCHER_OPTIONS="--no_ssh --node_rank 0" (1, 2, ... by the line of the host) and HEAD set.
#
# DeepSpeed passes variables that begin with PYTHON, MV2, UCX and MLFLOW to the other hosts, and those that begin with
# NCCL if the host where it starts has a GPU. List all others in a file .deepspeed_env in this folder, NAME=VALUE in each
# line, without empty lines. These two are often needed:
#
#   GLOO_SOCKET_IFNAME=eth0     gloo, which carries messages between the hosts' processors, else listens on the address
#                               of the host name, which may be 127.0.1.1
#   TORCH_GLOO_LAZY_INIT=1      above 256 ranks: gloo connects ranks when they first communicate, not all with all
#
# First the preflight checks all hosts, in about a minute; PREFLIGHT=0 skips it.
set -euo pipefail

HOSTFILE=${HOSTFILE:-examples/launch/hostfile}
HEAD=${HEAD:-} # address of the first host; empty: DeepSpeed asks it
PORT=${PORT:-29500} # of the first host
CONFIG=${CONFIG:-examples/bipe_rope_1.6b.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero1.json}
LAUNCHER_OPTIONS=${LAUNCHER_OPTIONS:-}
PREFLIGHT=${PREFLIGHT:-1}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$PREFLIGHT" = 1 ]; then
    # shellcheck disable=SC2086 # options are several words
    deepspeed --hostfile "$HOSTFILE" --master_addr "$HEAD" --master_port "$PORT" $LAUNCHER_OPTIONS \
        tools/preflight.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
fi

# shellcheck disable=SC2086 # options are several words
exec deepspeed --hostfile "$HOSTFILE" --master_addr "$HEAD" --master_port "$PORT" $LAUNCHER_OPTIONS \
    pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
