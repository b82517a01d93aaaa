"""What is printed never ends a program: closed streams, characters that a console lacks."""

import os
import subprocess
import sys

import pytest
from program import ROOT, _in_this_process

import utils

OPEN_ONE = """
import os, subprocess, sys, utils
utils.prepare_streams()
number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for stream in (sys.stdout, sys.stderr):
    print("said", file=stream, flush=True)
os.write(1, b"from C++ code")
child = "import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))"
subprocess.run([sys.executable, "-c", child], check=True)
os.write(number, b"%d" % number)
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_dev_null_and_no_file_takes_its_number(closed, tmp_path):
    words = [sys.executable, "-c", OPEN_ONE, str(tmp_path / "file")]
    done = subprocess.run(["sh", "-c", f'"$@" {closed}', "sh", *words], cwd=ROOT)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize(
    "words, status",
    [
        (["main_multi_gpu.py", "-cfg", "nowhere"], 2),
        (["main_multi_gpu.py"], 2),
        (["tools/make_lists.py", "-data_path", "nowhere"], 2),
    ],
)
def test_programs_run_with_closed_streams(words, status):
    words = [sys.executable, *words]
    done = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *words], cwd=ROOT)
    assert done.returncode == status


def log_a_cat(folder):
    """Logs and prints what latin-1 has not, and what is no text at all."""
    utils.prepare_streams()
    log = utils.setup_logging(str(folder), 0)
    log.info("outputs in out/猫")
    print("a path that is not UTF-8: \udcff", file=sys.stderr)
    return 0


def test_the_console_escapes_what_it_lacks_and_the_log_has_it(tmp_path, monkeypatch):
    result = _in_this_process(lambda argv: log_a_cat(tmp_path), [], encoding="latin-1").check()
    assert result.out.endswith("outputs in out/\\u732b\n") and "\\udcff" in result.err
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("outputs in out/猫\n")


def test_a_log_is_utf_8_in_any_locale(tmp_path):
    code = "import sys, utils; utils.setup_logging(sys.argv[1], 1).info('out/\\u732b \\udcff')"
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=env, check=True)
    text = (tmp_path / "log_1.txt").read_text(encoding="utf-8")
    assert text.endswith("out/猫 \\udcff\n")


def test_streams_without_reconfigure_are_left_as_they_are(monkeypatch):
    class Notebook:
        """Jupyter's."""

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Notebook())
    utils.prepare_streams()
