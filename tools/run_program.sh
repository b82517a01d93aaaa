# Sourced by run_train_multi.sh and run_eval_multi.sh, which set `here` to the repository's folder:
#
#   run_program FLAG...
#
# becomes main_multi_gpu.py with what the variables say, then the flags.  What no variable says is as
# in the YAML.

run_program() {
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0,1,2,3,4,5,6,7}
    export CUDA_VISIBLE_DEVICES
    if [ -z "${PYTHON:-}" ]; then  # the active environment, or that of run_demo.sh and run_tests.sh
        PYTHON=python
        command -v python >/dev/null 2>&1 || PYTHON=python3
        "$PYTHON" -c "import importlib.util as i; exit(not i.find_spec('paddle'))" 2>/dev/null ||
            [ ! -x "$here/.venv/bin/python" ] || PYTHON=$here/.venv/bin/python
    fi
    exec "$PYTHON" "$here/main_multi_gpu.py" \
        -cfg="${CFG:-$here/configs/gmlp_s16_224.yaml}" \
        ${BATCH_SIZE:+-batch_size="$BATCH_SIZE"} \
        ${DATA_PATH:+-data_path="$DATA_PATH"} \
        ${DATASET:+-dataset="$DATASET"} \
        ${OUTPUT:+-output="$OUTPUT"} \
        ${NPROCS:+-nprocs="$NPROCS"} \
        "$@"
}
