#!/usr/bin/env bash
# One machine, one rank a GPU, started by DeepSpeed:
#
#   examples/launch/one_machine.sh [FURTHER OPTIONS OF pretrain.py]
#
# GPUS says how many GPUs are taken, from the first on; all there are if it is unset. On a machine that is shared, name
# them: CUDA_VISIBLE_DEVICES=4,5 examples/launch/one_machine.sh
#
# A rank that fails ends the others. Started again, the run goes on from its last checkpoint; to have that done:
#
#   python tools/supervise.py RUN_DIR -- examples/launch/one_machine.sh --set run_dir=RUN_DIR
set -euo pipefail

CONFIG=${CONFIG:-examples/bipe_rope_151m.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}
PORT=${PORT:-29500} # of this machine; each launch that runs at the same time needs its own

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# DeepSpeed ignores CUDA_VISIBLE_DEVICES where it is told a number of GPUs, and then takes those of other people.
count=()
if [ -n "${GPUS:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        echo "GPUS=$GPUS and CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES both choose GPUs: unset one of them" >&2
        exit 2
    fi
    count=(--num_gpus "$GPUS")
fi

exec deepspeed "${count[@]}" --master_port "$PORT" \
    pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
