"""The rooms: which may import which, and what loads no Paddle."""

import ast
import subprocess
import sys

import pytest
from program import ROOT

# What a room may import of this repository's; a room is a file on top, or a folder.
LAW = {
    "gmlp": set(),
    "augment": set(),
    "utils": set(),
    "config": {"utils"},
    "ranks": {"utils"},
    "weights": {"utils"},
    "transforms": {"augment"},
    "datasets": {"transforms", "utils"},
    "training": {"config", "datasets", "gmlp", "ranks", "transforms", "utils", "weights"},
    "main_multi_gpu": {"config", "ranks", "utils", "training"},
    "hubconf": {"config", "gmlp", "weights"},
}
# Programs on top, which import what they need; nothing else imports them.
PROGRAMS = {"tools": set(LAW) | {"tools"}, "demo": set(LAW) | {"tools", "demo"}}
ON_TOP = {"main_multi_gpu", "hubconf", "tools", "demo"}


def files_of(room):
    path = ROOT / f"{room}.py"
    return [path] if path.exists() else sorted((ROOT / room).rglob("*.py"))


def imports_of(path):
    """(line, room) of each import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from ((node.lineno, name.split(".")[0]) for name in names)


def test_every_file_is_in_a_room():
    rooms = {*LAW, *PROGRAMS, "tests"}
    tops = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")}
    tops = {name.removesuffix(".py") for name in tops if not name.startswith(".")}
    assert tops - {"output", "log", "data"} == rooms


@pytest.mark.parametrize("room", [*LAW, *PROGRAMS])
def test_a_room_imports_what_the_law_allows(room):
    allowed = {**LAW, **PROGRAMS}[room] | {room}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of(room)
        for line, name in imports_of(path)
        if name in {*LAW, *PROGRAMS} - allowed
        or (name in ON_TOP and room not in PROGRAMS and name != room)
    ]
    assert files_of(room) and wrong == []


def test_the_rooms_names_are_told_from_those_of_libraries(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        "import os, utils\nfrom ranks.host import quiet\ndef f():\n    import tools.x\n"
    )
    assert list(imports_of(path)) == [(1, "os"), (1, "utils"), (2, "ranks"), (4, "tools")]


HEAVY = ("paddle", "numpy", "tqdm")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        *((name, HEAVY) for name in ("utils", "config", "main_multi_gpu")),
        *((f"ranks.{name}", HEAVY) for name in ("launch", "report", "host")),
        ("weights", ("paddle", "tqdm")),
        *((f"tools.{name}", ("paddle", "tqdm")) for name in ("common", "predict", "make_lists")),
    ],
)
def test_what_needs_no_paddle_does_not_load_it(module, unwanted):
    code = f"import sys, {module}; print([n for n in {unwanted!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


SAFE = ["-P"] if sys.version_info >= (3, 11) else []


@pytest.mark.parametrize(
    "words",
    [
        ["main_multi_gpu.py"],
        ["tools/predict.py"],
        ["tools/benchmark"],
        ["demo/finetune_demo.py"],
        [*SAFE, "-OO", "main_multi_gpu.py"],
        [*SAFE, "-OO", "tools/predict.py"],
        [*SAFE, "-OO", "tools/benchmark"],
        [*SAFE, "-OO", "demo/make_digits.py"],
        ["-m", "tools.predict"],
        ["-m", "tools.benchmark"],
        ["-m", "demo.resolution_study"],
        ["-m", "demo.demo_summary"],
    ],
)
def test_programs_start_by_path_by_module_with_a_safe_path_and_without_docstrings(words):
    done = subprocess.run([sys.executable, *words, "-h"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


PROGRAM_FILES = [path for room in PROGRAMS for path in files_of(room)]


@pytest.mark.parametrize("path", PROGRAM_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_program_imports_tools_common_first_which_says_what_package_is_missing(path):
    own = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)
           and node.module.split(".")[0] in {*LAW, *PROGRAMS}]  # fmt: skip
    if own and "__main__" in path.read_text():
        assert (own[0].module, own[0].names[0].name) == ("tools", "common")
