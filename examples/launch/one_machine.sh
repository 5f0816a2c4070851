#!/usr/bin/env bash
# One machine, one rank per GPU, started by DeepSpeed:
#
#   examples/launch/one_machine.sh [FURTHER OPTIONS OF pretrain.py]
#
# GPUS is the number of GPUs to use, from the first on; unset: all. On a shared machine, name
# them: CUDA_VISIBLE_DEVICES=4,5 examples/launch/one_machine.sh
#
# To check GPUs, data and disk first: deepspeed tools/preflight.py with the same options (docs/reliability.md).
#
# A rank that fails ends the others. The same command resumes the run from its last checkpoint; to automate this:
#
#   python tools/supervise.py RUN_DIR -- examples/launch/one_machine.sh --set run_dir=RUN_DIR
set -euo pipefail

CONFIG=${CONFIG:-examples/bipe_rope_151m.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Each launch that runs at the same time needs its own port of this machine; by default a free one is chosen.
PORT=${PORT:-$(python -c 'from megatron_bipe.runtime.distributed_init import free_port; print(free_port())')}

# Given a number of GPUs, DeepSpeed ignores CUDA_VISIBLE_DEVICES, and would use the GPUs of other users.
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
