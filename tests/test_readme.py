"""What the README shows works as printed."""

import importlib
import re
import shlex
import shutil
import sys

import numpy as np
import paddle
import pytest
from golden import draw_weights, load, timm_shapes, to_paddle
from program import ROOT, run

import config
import main_multi_gpu

README = (ROOT / "README.md").read_text()
CHINESE = (ROOT / "README_cn.md").read_text()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a gmlp_s16_224.pdparams like the published one, and the configs."""
    folder = tmp_path_factory.mktemp("published")
    weights = to_paddle(draw_weights(timm_shapes(load("gmlp_s16_224"))))
    paddle.save(
        {name: paddle.to_tensor(value) for name, value in weights.items()},
        str(folder / "gmlp_s16_224.pdparams"),
    )
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "tests" / "data" / "images" / "odd_257x300.jpg", folder / "picture.jpg")
    return folder


def test_the_python_snippets_give_timms_logits(published):
    first, second, third = snippets("python")
    check = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
{first}
import paddle, numpy as np
from golden import draw_images, load
images = paddle.to_tensor(draw_images(224))
expected = load("gmlp_s16_224")["logits_float64"]
assert np.abs(model(images).numpy() - expected).max() < 1e-5
model.set_state_dict({{k: v * 0 for k, v in model.state_dict().items()}})
{second}
assert np.abs(model(images).numpy() - expected).max() < 1e-5
assert model.forward_features(images).shape == [2, 256]
print("both agree")
{third}
"""
    result = run([sys.executable, "-c", check], cwd=published).check()
    agreed, number = result.out.splitlines()[-2:]
    assert agreed == "both agree" and 0 <= int(number) < 1000


def test_every_flag_and_key_in_the_readme_exists():
    paths = [
        *ROOT.glob("tools/[a-z]*.py"),
        *ROOT.glob("demo/[a-z]*.py"),
        ROOT / "tools/benchmark/__main__.py",
    ]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    tools = [importlib.import_module(name) for name in names]
    parsers = [module.build_parser() for module in (main_multi_gpu, *tools)
               if hasattr(module, "build_parser")]  # fmt: skip
    for parser in parsers:  # which grows by the parsers of subcommands
        choices = [action.choices for action in parser._actions if not action.option_strings]
        parsers += [each for some in choices if isinstance(some, dict) for each in some.values()]
    actions = (action for parser in parsers for action in parser._actions)
    flags = {option for action in actions for option in action.option_strings}
    shown = set(re.findall(r"(?<![\w-])(-[a-z_]{3,})(?=[= `\n])", README))
    assert shown and shown <= flags, shown - flags
    keys = set(re.findall(r"\b(?:TRAIN|DATA|MODEL)\.[A-Z_.]+[A-Z]", README))
    assert keys and keys <= set(config._KEYS), keys - set(config._KEYS)


@pytest.mark.parametrize("page", [README, CHINESE], ids=["English", "Chinese"])
def test_every_file_and_section_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\((?!http)([^)]+)\)", page)
    links += re.findall(r'src="(?!http)([^"]+)"', page)
    assert links
    headings = re.findall(r"^#+ (.+)$", page, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_both_pages_show_the_same():
    def parts(page):
        prose = re.sub(r"```.*?```", "", page, flags=re.S)
        code = re.findall(r"`([^`]+)`", prose)
        table = "".join(re.findall(r"^\|.*$", prose, re.M))
        return {
            "code blocks": re.findall(r"```.*?```", page, re.S),
            "sections": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)],
            "links": sorted(set(re.findall(r"\]\(((?:http|docs/figures)[^)]+)\)", prose))),
            "commands, flags and keys": sorted(set(code)),
            "numbers in tables": sorted(re.findall(r"\d[\d.,]*\d", table)),
        }

    english, chinese = parts(README), parts(CHINESE)
    for name in english:
        assert english[name] == chinese[name], name


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@|TODO|XXX", README)


def test_the_layout_table_names_every_module():
    folders = ("", "training", "weights", "ranks", "tools", "demo")
    for path in (path for folder in folders for path in (ROOT / folder).glob("[a-z]*.py")):
        name = path.relative_to(ROOT)
        assert f"[{name}]({name})" in README, name


def test_the_commands_are_those_of_the_scripts():
    commands = [
        text for text in snippets("shell") if "main_multi_gpu.py" in text and "CUDA" in text
    ]
    assert len(commands) == 2
    for script, command in zip(("run_eval_multi.sh", "run_train_multi.sh"), commands):
        words = re.findall(r"-(\w+)='?([\w./]+)", command)
        text = (ROOT / script).read_text() + (ROOT / "tools" / "run_program.sh").read_text()
        for flag, value in words:
            name = value.rsplit("/", 1)[-1]
            assert f"-{flag}" in text and name in text, (script, flag, value)


def test_the_model_table_is_the_tools_output():
    result = run([sys.executable, ROOT / "tools" / "model_table.py"]).check()
    for name in ("gmlp_ti16_224", "gmlp_s16_224", "gmlp_b16_224"):
        (row,) = [line for line in README.splitlines() if line.startswith(f"| {name}")]
        (printed,) = [line for line in result.out.splitlines() if name in line]
        for number in re.findall(r"\d[\d,]{6,}", printed):
            assert number in row, (name, number)
        assert len(re.findall(r"\d[\d,]{6,}", printed)) >= 2


def test_published_weights_are_s16s():
    weights = to_paddle(draw_weights(timm_shapes(load("gmlp_s16_224"))))
    assert len(weights) == 306 and sum(np.size(v) for v in weights.values()) == 19_422_656


def test_the_check_of_a_data_set_prints_what_the_page_shows(digits):
    (command,) = [text for text in snippets("shell") if "check_dataset.py" in text]
    shown = README.split(command)[1].split("```")[2].strip()
    words = shlex.split(command.replace("data/digits", f"'{digits}'"))
    assert run([sys.executable, ROOT / words[1], *words[2:]]).check().out.strip() == shown
