"""What the pages show works as printed, and what they name exists."""

import ast
import errno
import functools
import importlib
import os
import re
import shlex
import shutil
from unittest import mock

import numpy as np
import paddle
import pytest
from golden import draw_images, draw_weights, load, timm_shapes, to_paddle
from program import ROOT, run, run_tool

import augment
import config
import datasets
import main_multi_gpu
from tools import check_dataset, config_table, make_lists, model_table
from training import optim

FRONT, CHINESE = ROOT / "README.md", ROOT / "README_cn.md"
PAGES = [FRONT, *sorted(ROOT.glob("docs/*.md")), ROOT / "demo" / "README.md",
         ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]  # fmt: skip
every_page = pytest.mark.parametrize(
    "page", [*PAGES, CHINESE], ids=lambda page: str(page.relative_to(ROOT))
)


def snippets(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def output_below(page, command):
    """The output that a page shows of a command, a snippet of snippets(page, "shell")."""
    return page.read_text().split(command)[1].split("```")[2].strip()


# --- what is shown works ---


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a gmlp_s16_224.pdparams like the published one, a picture and the configs."""
    folder = tmp_path_factory.mktemp("published")
    weights = to_paddle(draw_weights(timm_shapes(load("gmlp_s16_224"))))
    paddle.save(
        {name: paddle.to_tensor(value) for name, value in weights.items()},
        str(folder / "gmlp_s16_224.pdparams"),
    )
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "tests" / "data" / "images" / "odd_257x300.jpg", folder / "picture.jpg")
    return folder


def is_timms(model):
    expected = load("gmlp_s16_224")["logits_float64"]
    return np.abs(model(paddle.to_tensor(draw_images(224))).numpy() - expected).max() < 1e-5


def test_the_front_pages_python_gives_timms_logits_and_a_class(published, monkeypatch, capsys):
    monkeypatch.chdir(published)
    (snippet,) = snippets(FRONT, "python")
    names = {}
    exec(snippet, names)
    assert is_timms(names["model"]) and not names["model"].training
    assert 0 <= int(capsys.readouterr().out) < 1000


def test_weights_in_python_both_ways_give_timms_logits(published, monkeypatch):
    monkeypatch.chdir(published)
    ours, paddlevits, _ = snippets(ROOT / "docs" / "deploy.md", "python")
    names = {}
    exec(ours, names)
    model = names["model"]
    assert (
        is_timms(model) and model.forward_features(paddle.zeros([2, 3, 224, 224])).shape[1] == 256
    )
    assert not model.training
    names = {}  # each stands alone
    exec(paddlevits, names)
    assert is_timms(names["model"]) and not names["model"].training


def test_the_hubs_snippet_gives_a_model_that_is_ready_to_predict(published, monkeypatch):
    monkeypatch.chdir(published)
    *_, snippet = snippets(ROOT / "docs" / "deploy.md", "python")
    names = {}
    exec(snippet.replace("/path/to/this/folder", str(ROOT)), names)
    assert is_timms(names["model"]) and names["logits"].shape == [1, 1000]


def test_another_format_of_data_is_read_as_shown(tmp_path):
    (snippet, _) = snippets(ROOT / "docs" / "data.md", "python")
    settings = config.get_config()
    settings.DATA.DATA_PATH, settings.DATA.DATASET = str(tmp_path), "csv"
    shutil.copy(ROOT / "tests" / "data" / "images" / "odd_257x300.jpg", tmp_path / "a.jpg")
    (tmp_path / "val.csv").write_text("file,label\na.jpg,7\n")
    with mock.patch.dict(datasets.DATASETS):
        exec(snippet, {})
        pixels, label = datasets.build_dataset(settings, train=False)[0, 0]
    assert pixels.shape == (224, 224, 3) and label == 7


def test_an_operator_is_added_as_shown():
    (_, snippet) = snippets(ROOT / "docs" / "data.md", "python")
    image = augment.Image.effect_noise((32, 32), 50).convert("RGB")
    with mock.patch.dict(augment.OPERATORS):
        exec(snippet, {})
        blurred = augment.RandAugment(1, prob=1, operators=["Blur"])(
            image, np.random.default_rng(0)
        )
    assert np.asarray(blurred).std() < 0.5 * np.asarray(image).std()


def test_an_optimizer_and_a_schedule_are_added_as_shown():
    (snippet,) = snippets(ROOT / "docs" / "design.md", "python")
    settings = config.get_config().TRAIN
    settings.OPTIMIZER.NAME, settings.LR_SCHEDULE, settings.BASE_LR = "Lamb", "linear", 0.1
    layer = paddle.nn.Linear(3, 2)
    before = layer.weight.numpy()
    with mock.patch.dict(optim.OPTIMIZERS), mock.patch.dict(optim.SCHEDULES):
        exec(snippet, {})
        optimizer = optim.build_optimizer(config.CfgNode({"TRAIN": settings}), layer, 0.1)
        layer(paddle.ones([1, 3])).sum().backward()
        optimizer.step()
        settings.LINEAR_SCALED_LR, settings.WARMUP_EPOCHS, settings.END_LR = None, 0, 0.0
        rate = optim.LearningRate(settings, 1, 1)
        assert rate(settings.NUM_EPOCHS // 2) == pytest.approx(0.05)
    assert np.abs(layer.weight.numpy() - before).max() > 1e-4


def test_the_commands_are_those_of_the_scripts():
    commands = [text for text in snippets(ROOT / "docs" / "training.md", "shell")
                if text.startswith("CUDA_VISIBLE_DEVICES=0,1")]  # fmt: skip
    assert len(commands) == 2
    for script, command in zip(("run_train_multi.sh", "run_eval_multi.sh"), commands):
        words = re.findall(r"-(\w+)='?([\w./]+)", command)
        files = (script, "tools/run_program.sh", "config.py")  # what they do not say is a default
        text = "".join((ROOT / name).read_text() for name in files)
        for flag, value in words:
            name = value.rsplit("/", 1)[-1]
            assert f"-{flag}" in text and name in text, (script, flag, value)


def test_fine_tuning_is_the_same_command_on_both_pages():
    def command(page):
        return next(
            words for words in commands_of(page) if "configs/gmlp_s16_finetune.yaml" in words
        )

    assert command(FRONT) == command(ROOT / "docs" / "training.md")


def test_lists_and_the_check_of_a_data_set_print_what_the_page_shows(digits, tmp_path):
    page = ROOT / "docs" / "data.md"
    for tool in (make_lists, check_dataset):
        name = tool.__name__.replace("tools.", "tools/") + ".py"
        command = next(text for text in snippets(page, "shell") if name in text)
        root = digits
        if tool is make_lists:
            root = tmp_path / "digits"
            (root / "train").mkdir(parents=True)
            for folder in (digits / "train").iterdir():
                (root / "train" / folder.name).symlink_to(folder)
        words = [word.replace("data/digits", str(root)) for word in shlex.split(command)]
        printed = (
            run_tool(tool, *words[2:]).check().out.replace(shlex.quote(f"{root}/train"), "DIR")
        )
        assert printed.strip() == output_below(page, command).replace("data/digits/train", "DIR")
    before, command, _ = page.read_text().partition("-data_path data/digits")
    assert "`python demo/make_digits.py data/digits`" in before and command


def commands_of(page):
    """The commands that a page shows, as lists of words."""
    text = "\n".join(snippets(page, "shell")).replace("\\\n", " ")
    return [
        shlex.split(line.replace("<time>", "TIME"), comments=True) for line in text.splitlines()
    ]


@every_page
def test_a_file_that_a_command_takes_is_named_without_a_pattern(page):
    text = "\n".join(snippets(page, "shell"))
    unquoted = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "", text)
    # A file of a run, of which there may be several tomorrow.
    assert re.findall(r"\S*\*\S*", unquoted) == []


def test_what_the_commands_of_the_pages_write_is_ignored_by_git():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    outputs = {"runs/train-TIME/last.pdparams", "output/train-TIME/log.txt"}
    for words in (words for page in PAGES for words in commands_of(page)):
        for flag, word in zip(words, words[1:]):
            if flag in ("-output", "-plot", "-json", "--log_dir", "-log_dir"):
                outputs.add(word)
        outputs.update(word for word in words if word.endswith((".safetensors", ".pdparams")))
    outputs = {path for path in outputs if not re.match("[/-]|docs/|[A-Z_]+=", path)}
    assert {"exported", "mine.safetensors", "curves.png", "launch"} <= outputs
    paths = [path if "." in path else f"{path}/file" for path in sorted(outputs)]
    done = run(["git", "-C", ROOT, "check-ignore", *paths], cwd=ROOT)
    assert set(paths) - set(done.out.splitlines()) == set()


# --- what is named exists ---


def test_every_flag_and_key_on_the_pages_exists():
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
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"(?<![\w-])(-[a-z_]{3,})(?=[= `\n])", text))
    assert shown and shown <= flags, shown - flags
    sections = r"\b(?:TRAIN|DATA|MODEL)\.[A-Z_.]+[A-Z]|(?<=`)(?:SAVE|KEEP|REPORT|CPU|AMP)_[A-Z_]+"
    keys = set(re.findall(sections, text))
    assert keys and keys <= set(config.KEYS), keys - set(config.KEYS)


def anchors(page):
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M
    )
    named = set(re.findall(r'<a id="([^"]+)">', page.read_text()))
    return named | {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}


@every_page
def test_every_file_and_section_that_a_page_links_to_exists(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    links += re.findall(r'src="(?!http)([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_every_file_that_a_page_names_exists(page):
    text = re.sub(r"https?://\S+", "", page.read_text())
    names = re.findall(
        r"\b(?:tools|demo|tests|configs|docs|training|weights|ranks)/[\w/]+\.\w+", text
    )
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("message", re.findall(
    r"^\*\*`(.+)`\*\*$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M
))  # fmt: skip
def test_a_message_that_is_explained_is_one_of_the_programs(message):
    fixed = [part.strip(" ();") for part in re.split("…|[:;] ", message)]
    fixed = [part for part in fixed if len(part) > 3]
    unknown = [part for part in fixed if part not in program_texts() and part not in SYSTEMS]
    assert fixed and not unknown


SYSTEMS = {
    os.strerror(number) for number in (errno.ENOENT, errno.ENOSPC, errno.EMFILE)
}  # the system's words


@functools.cache
def program_texts():
    """All text in the program's sources; what differs in a message is a NUL."""
    texts = []
    for path in ROOT.glob("**/*.py"):
        top = path.relative_to(ROOT).parts[0]
        if top == "tests" or top.startswith("."):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                texts.append("".join(p if isinstance(p, str) else "\0" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_file_table_names_every_module():
    page = (ROOT / "docs" / "design.md").read_text()
    folders = ("", "training", "weights", "ranks", "tools", "demo")
    for path in (path for folder in folders for path in (ROOT / folder).glob("[a-z]*.py")):
        name = path.relative_to(ROOT)
        assert f"[{name}](../{name})" in page, name


# --- what is counted ---


def test_the_model_table_is_the_tools_output():
    printed = run_tool(model_table).check().out
    zoo = FRONT.read_text()
    for name in ("gmlp_ti16_224", "gmlp_s16_224", "gmlp_b16_224"):
        (row,) = [line for line in zoo.splitlines() if line.startswith(f"| [{name}]")]
        (counted,) = [line for line in printed.splitlines() if name in line]
        parameters, multiply_adds = re.findall(r"\d[\d,]{6,}", counted)
        assert parameters in row and multiply_adds in zoo, name


def test_published_weights_are_s16s():
    weights = to_paddle(draw_weights(timm_shapes(load("gmlp_s16_224"))))
    assert len(weights) == 306 and sum(np.size(v) for v in weights.values()) == 19_422_656


def test_keys_and_flags_that_paddlevit_lacks_are_all_marked_new_and_no_others():
    paddlevits = {
        f"{section}.{name}".strip(".")
        for section, names in PADDLEVITS_KEYS.items()
        for name in names.split()
    }
    meanings = config_table.meanings()
    marked = {key for key in config.KEYS if meanings[key].startswith("new: ")}
    assert marked == set(config.KEYS) - paddlevits
    assert paddlevits <= set(config.KEYS)
    actions = [a for a in main_multi_gpu.build_parser()._actions if a.dest != "help"]
    new = {f"-{action.dest}" for action in actions} - {
        f"-{name}" for name in PADDLEVITS_FLAGS.split()
    }
    page = (ROOT / "docs" / "config.md").read_text()
    sentence = page.split("Flags that PaddleViT does not have: ")[1].split(". ")[0]
    assert set(re.findall(r"`(-\w+)`", sentence)) == new
    assert {f"-{action.dest}" for action in actions if "(new" in action.help} == new


# Of PaddleViT's gMLP folder, beside BASE.
PADDLEVITS_KEYS = {
    "DATA": "BATCH_SIZE BATCH_SIZE_EVAL DATA_PATH DATASET IMAGE_SIZE IMAGE_CHANNELS CROP_PCT "
    "NUM_WORKERS IMAGENET_MEAN IMAGENET_STD",
    "MODEL": "TYPE NAME RESUME PRETRAINED NUM_CLASSES DROPOUT ATTENTION_DROPOUT DROPPATH",
    "MODEL.MIXER": "PATCH_SIZE EMBED_DIM DEPTH MLP_RATIO",
    "TRAIN": "LAST_EPOCH NUM_EPOCHS WARMUP_EPOCHS WEIGHT_DECAY BASE_LR WARMUP_START_LR END_LR "
    "GRAD_CLIP ACCUM_ITER LINEAR_SCALED_LR MODEL_EMA MODEL_EMA_DECAY MODEL_EMA_FORCE_CPU SMOOTHING "
    "COLOR_JITTER AUTO_AUGMENT RAND_AUGMENT RAND_AUGMENT_LAYERS RAND_AUGMENT_MAGNITUDE MIXUP_ALPHA "
    "MIXUP_PROB MIXUP_SWITCH_PROB MIXUP_MODE CUTMIX_ALPHA CUTMIX_MINMAX RANDOM_ERASE_PROB "
    "RANDOM_ERASE_MODE RANDOM_ERASE_COUNT RANDOM_ERASE_SPLIT",
    "TRAIN.OPTIMIZER": "NAME EPS BETAS",
    "": "SAVE SAVE_FREQ REPORT_FREQ VALIDATE_FREQ SEED EVAL AMP",
}
PADDLEVITS_FLAGS = (
    "cfg dataset data_path output batch_size batch_size_eval image_size accum_iter pretrained "
    "resume last_epoch eval amp"
)


def test_the_key_table_is_the_tools_output():
    assert run_tool(config_table).check().out in config_table.PAGE.read_text(), (
        "run tools/config_table.py -update"
    )
    meanings = config_table.meanings()
    assert meanings.keys() == config.KEYS.keys() and all(meanings.values())


def test_the_key_tables_update_changes_nothing_but_the_table(tmp_path):
    page = tmp_path / "config.md"
    text = config_table.PAGE.read_text()
    page.write_text(re.sub(r"^\| `TRAIN.*\n", "", text, flags=re.M))
    with mock.patch.object(config_table, "PAGE", page):
        run_tool(config_table, "-update").check()
    assert page.read_text() == text


# --- the pages themselves ---


def test_the_front_page_is_three_screens():
    text = FRONT.read_text()
    assert text.count("\n") <= 250 and len(text.split()) <= 2500


def test_both_front_pages_show_the_same():
    def parts(page):
        text = page.read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        code = re.findall(r"`([^`]+)`", prose)
        table = "".join(re.findall(r"^\|.*$", prose, re.M))
        return {
            "code blocks": re.findall(r"```.*?```", text, re.S),
            "sections": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)],
            "links": sorted(set(re.findall(r"\]\(((?!README)[^)]+)\)", prose))),
            "commands, flags and keys": sorted(set(code)),
            "numbers in tables": sorted(re.findall(r"\d[\d.,]*\d", table)),
        }

    english, chinese = parts(FRONT), parts(CHINESE)
    for name in english:
        assert english[name] == chinese[name], name


@every_page
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"@[A-Z]+@|TODO|XXX|FIXME", page.read_text())


def test_the_linter_before_a_commit_is_the_suites():
    wanted = re.search(r"ruff==([\d.]+)", (ROOT / "requirements-dev.txt").read_text())[1]
    assert f"rev: v{wanted}\n" in (ROOT / ".pre-commit-config.yaml").read_text()
