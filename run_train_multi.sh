#!/bin/sh
# Trains on 8 GPUs with the paper's recipe, or with whatever these variables say; further arguments
# go to main_multi_gpu.py:
#   CFG, DATASET, DATA_PATH, BATCH_SIZE (per device), PRETRAINED, OUTPUT, NPROCS, PYTHON,
#   CUDA_VISIBLE_DEVICES
# Without a data set of your own, see run_demo.sh.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/tools/run_program.sh"
run_program ${PRETRAINED:+-pretrained="$PRETRAINED"} -amp "$@"
