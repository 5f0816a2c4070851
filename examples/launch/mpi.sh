#!/usr/bin/env bash
# MPI's mpiexec, one rank per GPU, on this machine or on the hosts of a file:
#
#   RANKS=16 MPI_OPTIONS="--hostfile my_hosts" examples/launch/mpi.sh [FURTHER OPTIONS OF pretrain.py]
#
# MPI starts the ranks and exchanges the rendezvous address (by mpi4py: pip install -e '.[mpi]'); after that it is not
# used. If MASTER_ADDR and MASTER_PORT are set for all ranks, mpi4py is not needed. A rank that fails ends the others.
#
# Written for Open MPI. MPICH and Intel MPI: MPI_OPTIONS="-f my_hosts -ppn 8", BIND="-bind-to none".
# Open MPI exports variables to other hosts only on request: MPI_OPTIONS="... -x PATH -x NCCL_SOCKET_IFNAME".
set -euo pipefail

RANKS=${RANKS:-8}
BIND=${BIND:---bind-to none} # Open MPI would bind each rank, with all its threads, to one core
MPI_OPTIONS=${MPI_OPTIONS:-}
CONFIG=${CONFIG:-examples/bipe_rope_151m.yaml}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# shellcheck disable=SC2086 # options are several words
exec mpiexec -n "$RANKS" $BIND $MPI_OPTIONS \
    python pretrain.py --ds_config "$DS_CONFIG" --config "$CONFIG" "$@"
