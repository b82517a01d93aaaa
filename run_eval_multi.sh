#!/bin/sh
# Evaluates the published weights on 8 GPUs, or whatever these variables say; further arguments go to
# main_multi_gpu.py:
#   CFG, DATASET, DATA_PATH, BATCH_SIZE (per device), PRETRAINED, OUTPUT, NPROCS, PYTHON,
#   CUDA_VISIBLE_DEVICES
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/tools/run_program.sh"
[ -n "${CFG:-}" ] || PRETRAINED=${PRETRAINED:-./gmlp_s16_224.pdparams}
run_program -eval ${PRETRAINED:+-pretrained="$PRETRAINED"} -amp "$@"
