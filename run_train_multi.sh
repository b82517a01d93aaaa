#!/bin/sh
# Trains on 8 GPUs with the paper's recipe, or with whatever these variables say; further arguments
# go to main_multi_gpu.py:
#   CFG, DATASET, DATA_PATH, BATCH_SIZE (per device), PRETRAINED, OUTPUT, NPROCS, PYTHON,
#   CUDA_VISIBLE_DEVICES
set -eu
here=$(cd "$(dirname "$0")" && pwd)

data=${DATA_PATH:-/dataset/imagenet}
if [ ! -f "$data/train_list.txt" ]; then
    echo "run_train_multi.sh: there is no data set in $data (no train_list.txt): set DATA_PATH to" \
        "its folder (README, data preparation), or see 'sh run_demo.sh' for a small one" >&2
    exit 2
fi
if [ -n "${PRETRAINED:-}" ] && [ ! -f "$PRETRAINED" ]; then
    echo "run_train_multi.sh: there is no file $PRETRAINED: set PRETRAINED to existing weights" >&2
    exit 2
fi

CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3,4,5,6,7}
export CUDA_VISIBLE_DEVICES
if [ -z "${PYTHON:-}" ]; then  # the environment of run_demo.sh and run_tests.sh, or the active one
    PYTHON=python
    command -v python >/dev/null 2>&1 || PYTHON=python3
    "$PYTHON" -c "import importlib.util as i; exit(not i.find_spec('paddle'))" 2>/dev/null ||
        [ ! -x "$here/.venv/bin/python" ] || PYTHON=$here/.venv/bin/python
fi
exec "$PYTHON" "$here/main_multi_gpu.py" \
    -cfg="${CFG:-$here/configs/gmlp_s16_224.yaml}" \
    -dataset="${DATASET:-imagenet2012}" \
    -batch_size="${BATCH_SIZE:-256}" \
    -data_path="$data" \
    ${PRETRAINED:+-pretrained="$PRETRAINED"} \
    ${OUTPUT:+-output="$OUTPUT"} \
    ${NPROCS:+-nprocs="$NPROCS"} \
    -amp \
    "$@"
