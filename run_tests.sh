#!/bin/sh
# Runs the tests, after setting up what they need; arguments go to pytest.
#   sh run_tests.sh              the suite, without what takes long, on all cores
#   sh run_tests.sh -m slow      what takes long
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/tools/setup_env.sh"
setup_test_env

[ $# -gt 0 ] || set -- -n auto --maxprocesses 4 --dist loadfile
cd "$here"
exec "$PYTHON" -m pytest "$@"
