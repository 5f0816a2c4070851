#!/usr/bin/env bash
# One machine, one rank a GPU, started by DeepSpeed:
#
#   examples/launch/one_machine.sh [FURTHER OPTIONS OF pretrain.py]
#
# A rank that fails ends the others. Started again, the run goes on from its last checkpoint; to have that done:
#
#   python tools/supervise.py RUN_DIR -- examples/launch/one_machine.sh --set run_dir=RUN_DIR
set -euo pipefail

GPUS=${GPUS:-8}
CONFIG=${CONFIG:-examples/bipe_rope_151m.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}
PORT=${PORT:-29500} # of this machine; each launch that runs at the same time needs its own

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec deepspeed --num_gpus "$GPUS" --master_port "$PORT" \
    pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
