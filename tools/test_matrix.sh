#!/bin/sh
# Runs the tests on the oldest and newest Python of each Paddle that is supported, one after another:
#   sh tools/test_matrix.sh [ARGUMENTS OF PYTEST]
# Interpreters are looked for by name (python3.9, ...); one that is missing is said and left out.
# Environments are made in .venv-<Paddle>-<Python>, logs beside them.  Exit status 1 if any failed or
# was left out.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
status=0
summary=
for pair in "paddlepaddle==3.3.1 3.9" "paddlepaddle==3.3.1 3.13" \
    "paddlepaddle-gpu==2.6.2 3.9" "paddlepaddle-gpu==2.6.2 3.12"; do
    paddle=${pair% *}
    version=${pair#* }
    python=$(command -v "python$version")
    if ! "${python:-false}" -c ""; then
        summary="$summary$paddle, Python $version: no python$version found
"
        status=1
        continue
    fi
    venv=$here/.venv-${paddle##*=}-$version
    echo "$paddle, Python $version: log in $venv.log" >&2
    if PADDLE=$paddle PYTHON=$python VENV=$venv sh "$here/run_tests.sh" "$@" >"$venv.log" 2>&1; then
        result=
    else
        result="FAILED, "
        status=1
    fi
    summary="$summary$paddle, Python $version: $result$(tail -n 1 "$venv.log")
"
done
printf '%s' "$summary"
exit $status
