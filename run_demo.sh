#!/bin/sh
# The whole program on real images, in minutes: unpacks 5,000 handwritten digits, trains a
# small gMLP on them in two processes, and evaluates what came out.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if ! [ -w "$here" ]; then
    echo "$0: $here cannot be written, and data, outputs and perhaps .venv go there: run a copy," \
        "cp -r '$here' \"\$HOME/gmlp\" && sh \"\$HOME/gmlp/run_demo.sh\"" >&2
    exit 2
fi
. "$here/tools/setup_env.sh"
setup_env "$here/requirements.txt"

cd "$here"
"$PYTHON" demo/make_digits.py data/digits

CFG=configs/gmlp_digits.yaml
DATA_PATH=data/digits
BATCH_SIZE=32
OUTPUT=output/demo-$(date +%Y%m%d-%H%M%S)-$$
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1}
export CFG DATA_PATH BATCH_SIZE OUTPUT CUDA_VISIBLE_DEVICES
if [ "$("$PYTHON" -c 'from ranks import launch; print(launch.count_gpus())')" = 0 ]; then
    CUDA_VISIBLE_DEVICES=
    NPROCS=2
    export NPROCS
fi
PRETRAINED= sh run_train_multi.sh "$@"

PRETRAINED=$(echo "$OUTPUT"/train-*)/best_weights.pdparams
export PRETRAINED
sh run_eval_multi.sh
"$PYTHON" demo/demo_summary.py "$OUTPUT"
