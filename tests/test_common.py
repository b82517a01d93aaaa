"""What all tools share: wherever they are started, they answer, and end in one way."""

import importlib
import io
import os
import signal
import sys

import pytest
from program import ROOT, run, run_tool

from tools import common, to_visualdl

FILES = [*ROOT.glob("tools/[a-z]*.py"), ROOT / "tools/benchmark/__main__.py",
         *ROOT.glob("demo/[a-z]*.py")]  # fmt: skip
NAMES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
TOOLS = [name for name in NAMES if hasattr(importlib.import_module(name), "build_parser")]


class Tool:
    """A tool whose work is to return what it is given."""

    @staticmethod
    def build_parser():
        parser = common.Parser("A tool.\n\nMore.", prog="tool.py")
        parser.add_argument("-pretrained", metavar="FILE")
        parser.add_argument("-strip", action="store_true")
        parser.add_argument("source", metavar="SOURCE", nargs="?")
        parser.add_argument("target", metavar="TARGET", nargs="?")
        return parser

    def __init__(self, work=lambda args: None):
        self.work = work


def test_rank_variables_of_a_container_do_not_reach_a_tool(environment, monkeypatch):
    launchers = ["PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM", "PADDLE_TRAINER_ENDPOINTS",
                 "PADDLE_CURRENT_ENDPOINT", "PADDLE_LOCAL_SIZE", "PADDLE_LOCAL_RANK",
                 "PADDLE_GLOBAL_SIZE", "PADDLE_GLOBAL_RANK", "PADDLE_RANK_IN_NODE", "PADDLE_NNODES",
                 "PADDLE_MASTER", "PADDLE_DISTRI_BACKEND", "FLAGS_selected_gpus",
                 "GMLP_REPORT_PIPE"]  # fmt: skip
    others = ["PADDLE_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "FLAGS_use_mkldnn"]
    environment(**dict.fromkeys([*launchers, *others], "2"))
    seen = {}
    run_tool(Tool(lambda args: seen.update(os.environ))).check()
    assert [name for name in launchers if name in seen] == []
    assert [name for name in others if seen.get(name) != "2"] == []


@pytest.mark.parametrize("name", [*TOOLS, "main_multi_gpu"])
def test_help_is_there_without_docstrings_as_under_python_oo(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(module, "__doc__", None)
    for function in vars(module).values():
        if callable(function) and getattr(function, "__module__", "") == name:
            monkeypatch.setattr(function, "__doc__", None)
    with pytest.raises(SystemExit) as end:
        module.build_parser().parse_args(["-h"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_the_shared_command_line(name):
    module = importlib.import_module(name)
    assert isinstance(module.build_parser(), common.Parser)
    assert module.build_parser().description == module.__doc__.split("\n")[0]


@pytest.mark.parametrize(
    "words, part",
    [
        (["-pretrained", "a", "b", "c", "d"], "-pretrained takes one FILE"),
        (["a", "b", "c"], "it takes one SOURCE and one TARGET"),
        (["-strip", "a", "b", "c"], "it takes one SOURCE and one TARGET"),
        (["a", "b", "-pretrained", "c", "d"], "-pretrained takes one FILE"),
    ],
)
def test_what_takes_one_file_says_so_when_a_pattern_gives_it_several(words, part):
    result = run_tool(Tool(), *words)
    result.refused(2, f"{words[-1]} ({part}: did a pattern match several files?)")
    assert "unrecognized arguments: -x\n" in run_tool(Tool(), "-x").err
    run_tool(to_visualdl, "a", "b").refused(2, "unrecognized arguments: b (it takes one RUN: ")


def test_ctrl_c_ends_a_tool_unless_it_is_ignored_as_in_what_a_script_starts_with_an_ampersand():
    before = signal.getsignal(signal.SIGINT)
    work = Tool(lambda args: os.kill(os.getpid(), signal.SIGINT))
    try:
        for handler, status in ((signal.SIG_IGN, 0), (before, 130)):
            signal.signal(signal.SIGINT, handler)
            assert run_tool(work).status == status
    finally:
        signal.signal(signal.SIGINT, before)


class NotebookStream(io.TextIOBase):
    """As ipykernel's: text in, and no more."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def __getattribute__(self, name):
        if name in ("reconfigure", "fileno"):
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_a_notebook_runs_a_tool_and_keeps_its_own_signal_handlers(monkeypatch):
    def work(args):
        signal.signal(signal.SIGTERM, common.leave)
        print("\udcff and 猫")

    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.setitem(sys.modules, "IPython", None)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, NotebookStream())
    tool = Tool(work)
    assert common.run(tool.build_parser(), tool.work, []) == 0
    assert sys.stdout.text == "\udcff and 猫\n" and sys.stderr.text == ""
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_a_missing_package_is_one_sentence():
    code = f"import sys; sys.modules['yacs'] = None; sys.path.insert(0, {str(ROOT)!r})\n"
    result = run([sys.executable, "-c", code + "from tools import common"])
    result.refused(1, "this Python has no package yacs", "see the README's install section\n")
