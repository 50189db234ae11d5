#!/usr/bin/env bash
# Train on one machine, a process a GPU (or PROCESSES of them); call it again to go on.
#
#     DATA=data OUT=teacher deploy/train.sh pretrain --preset 0.17B --recipe published
set -euo pipefail
data=${DATA:?set DATA to a directory of fsdfm prepare} out=${OUT:?set OUT to the run directory}
command=${1:?name a command: pretrain, adapt or distill}
shift
# Seconds after a signal for the update in progress and the checkpoint; torchrun's own are 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m fsdfm "$command" \
  --data "$data" --out "$out" "$@"
