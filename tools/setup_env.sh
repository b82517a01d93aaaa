# Sourced by run_demo.sh and run_tests.sh, which set `here` to the repository's folder:
#
#   setup_env REQUIREMENTS_FILE MODULE...
#   setup_test_env
#
# sets PYTHON to an interpreter that has Paddle, the program's packages and the named modules.
# The active Python is used as it is where it already has Paddle and the modules.  Otherwise a virtual
# environment is made in .venv (or in $VENV) and filled: Paddle's GPU wheel where there is an NVIDIA
# GPU, the CPU wheel elsewhere.  PYTHON names the interpreter to start from (3.9 to 3.13), and PADDLE
# another wheel, such as paddlepaddle-gpu==2.6.2.

PADDLE_VERSION=3.3.1
# Paddle's documented package index; the part at the end is the CUDA version of the wheel.
PADDLE_GPU_INDEX=${PADDLE_GPU_INDEX:-https://www.paddlepaddle.org.cn/packages/stable/cu126/}

has_modules() {  # has_modules PYTHON MODULE...: can it import them all?
    "$1" - "$@" <<'END' 2>/dev/null
import importlib.util, sys
sys.exit(not all(importlib.util.find_spec(name) for name in sys.argv[2:]))
END
}

has_paddle() {  # has_paddle PYTHON: the wheel that PADDLE names, or any where it names none?
    if [ -z "${PADDLE:-}" ]; then
        has_modules "$1" paddle
    else
        "$1" - "$PADDLE" <<'END_OF_CODE' 2>/dev/null
import sys
from importlib import metadata
name, _, version = sys.argv[1].partition("==")
sys.exit(version not in ("", metadata.version(name)))
END_OF_CODE
    fi
}

is_supported() {  # is_supported PYTHON: a version that Paddle has wheels for?
    "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {  # prints $PYTHON or the first supported interpreter
    if [ -n "${PYTHON:-}" ] && ! is_supported "$PYTHON"; then
        echo "$0: PYTHON is $PYTHON, which is not a Python 3.9 to 3.13" >&2
        return 1
    fi
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.12 python3.13 python3.11 \
        python3.10 python3.9; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "$0: no Python 3.9 to 3.13 found: install one, or set PYTHON to its path" >&2
    return 1
}

install_paddle() {  # install_paddle PYTHON
    if [ -n "${PADDLE:-}" ]; then
        "$1" -m pip install "$PADDLE"
        return
    fi
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        "$1" -m pip install "paddlepaddle-gpu==$PADDLE_VERSION" -i "$PADDLE_GPU_INDEX" && return
        echo "$0: the GPU wheel of Paddle could not be installed from $PADDLE_GPU_INDEX (set" \
            "PADDLE_GPU_INDEX for another CUDA version); going on with the CPU wheel" >&2
    fi
    "$1" -m pip install "paddlepaddle==$PADDLE_VERSION"
}

make_venv() {  # make_venv BASE_PYTHON FOLDER REQUIREMENTS: fills FOLDER, which may be half done
    system=
    if has_paddle "$1"; then
        system=--system-site-packages  # keeps the active Python's Paddle; only the rest is installed
    fi
    if ! "$1" -m venv $system "$2"; then
        echo "$0: cannot make a virtual environment in $2 (on Debian and Ubuntu: install the package" \
            "python3-venv; in a folder without write permission: set VENV)" >&2
        return 1
    fi
    echo "$0: installing what is missing of Paddle $PADDLE_VERSION and $(basename "$3") into $2;" \
        "this takes minutes" >&2
    PIP_DISABLE_PIP_VERSION_CHECK=1
    PIP_PROGRESS_BAR=off
    export PIP_DISABLE_PIP_VERSION_CHECK PIP_PROGRESS_BAR
    has_paddle "$2/bin/python" || install_paddle "$2/bin/python" >&2 || return 1
    "$2/bin/python" -m pip install -r "$3" >&2
}

setup_env() {  # setup_env REQUIREMENTS MODULE...
    requirements=$1
    shift
    set -- paddle numpy yaml yacs PIL tqdm safetensors "$@"
    venv=${VENV:-$here/.venv}
    base=$(find_python) || return 1
    if has_modules "$base" "$@" && has_paddle "$base"; then
        PYTHON=$base
    else
        if ! { has_modules "$venv/bin/python" "$@" && has_paddle "$venv/bin/python"; }; then
            make_venv "$base" "$venv" "$requirements" || return 1
        fi
        PYTHON=$venv/bin/python
    fi
    export PYTHON
}

setup_test_env() {  # what tests and linter need
    setup_env "$here/requirements-dev.txt" pytest xdist ruff matplotlib visualdl onnxruntime \
        skimage sklearn scipy
}
