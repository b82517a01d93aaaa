"""tools/plot_gates.py as its users run it: the right filters, in the right places."""

import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import paddle
import pytest
from program import CONFIG, ROOT, run

from tools import common, plot_gates
from config import get_config
from gmlp import Sizes, SpatialGatingUnit, build_gmlp
from weights import pdparams

TOOL = ROOT / "tools" / "plot_gates.py"
PNG = b"\x89PNG\r\n\x1a\n"

pytest.importorskip("matplotlib")


def make_weights(path, classes=10, size=28):
    """The digits' model, whose gates have weight 1000 x block + 20 x source + target."""
    config = get_config(CONFIG)
    config.MODEL.NUM_CLASSES, config.DATA.IMAGE_SIZE = classes, size
    state = build_gmlp(config).state_dict()
    for name, tensor in state.items():
        if name.endswith("gate.proj.weight"):
            source, target = np.indices(tensor.shape)
            weight = 1000 * int(name.split(".")[1]) + 20 * source + target
            state[name] = paddle.to_tensor(weight.astype("float32"))
    pdparams.write(path, state)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return make_weights(tmp_path_factory.mktemp("gates") / "weights.pdparams")


def called(*args):
    words = ["-cfg", CONFIG, *args]
    return common.run(plot_gates.build_parser(), plot_gates.work, [str(word) for word in words])


def refused(capsys, *args):
    """The sentence with which the tool refuses its arguments."""
    assert called(*args) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def maps(filters, layers, tokens):
    """The image and the ring's place (y, x) of each map of a figure, in rows."""
    plt = plot_gates.import_pyplot()
    figure = plot_gates.draw(plt, filters, layers, tokens, "name")
    plt.close(figure)
    axes = [axis for axis in figure.axes if axis.images]  # and none of the colour bar
    rings = [axis.get_lines()[-1] for axis in axes]
    places = [(int(ring.get_ydata()[0]), int(ring.get_xdata()[0])) for ring in rings]
    return [axis.images[0] for axis in axes], places


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 3), (6, 10)])
def test_the_words_are_whole_and_say_what_colours_and_ring_are(rows, columns):
    plt = plot_gates.import_pyplot()
    filters = [np.eye(64, dtype="float32").reshape(64, 8, 8)] * rows
    name = "a model with a $long$ name of some forty characters"
    figure = plot_gates.draw(plt, filters, range(rows), range(columns), name)
    figure.canvas.draw()
    (bar,) = (axis for axis in figure.axes if not axis.images)
    assert [label.get_text() for label in bar.get_yticklabels()] == ["-largest", "0", "+largest"]
    title, caption = figure._suptitle, figure._supxlabel
    assert name.replace("$", r"\$") in title.get_text().replace("\n", " ")
    words = caption.get_text().replace("\n", " ")
    assert "for one token, the ring" in words and "each map's own largest weight" in words
    for text in (title, caption, *bar.get_yticklabels()):
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        assert box.y1 <= figure.bbox.y1
    plt.close(figure)


def test_it_makes_a_picture(weights, tmp_path):
    output = tmp_path / "gates.png"
    command = [sys.executable, TOOL, "-cfg", CONFIG, "-pretrained", weights, "-output", output]
    result = run([*command, "-layers", "0,3", "-count", 4]).check()
    assert result.err == ""
    assert result.out == f"{output}: gmlp_digits, blocks 0, 3 of 4, 4 of 4 x 4 tokens\n"
    assert output.read_bytes().startswith(PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["gates.png"]


def test_a_filter_is_what_the_model_does_for_its_token():
    """A gate reads one token for another: the other's filter has a 1 in the place of the first."""
    unit = SpatialGatingUnit(Sizes(9, 3, 1, 3, dim=2, depth=1, mlp_ratio=2))
    unit.norm = paddle.nn.Identity()
    source, target = 5, 6  # (1, 2) and (2, 0)
    weight = np.zeros([9, 9], "float32")
    weight[source, target] = 1
    unit.proj.weight.set_value(weight)
    unit.proj.bias.set_value(np.zeros(9, "float32"))
    v = np.arange(1, 10, dtype="float32")
    v_of_tokens = paddle.to_tensor(np.stack([v, v], axis=1)[None])
    gate = unit(paddle.ones([1, 9, 2]), v_of_tokens).numpy()[0, :, 0]
    assert gate[target] == v[source] and np.count_nonzero(gate) == 1

    filters = plot_gates.to_filters(weight)
    assert filters.shape == (9, 3, 3)
    assert np.argwhere(filters).tolist() == [[target, 1, 2]]
    (image, other), places = maps([filters], [0], [target, 0])
    assert np.argwhere(image.get_array()).tolist() == [[1, 2]] and image.origin == "upper"
    assert not other.get_array().any()
    assert places == [(2, 0), (0, 0)]


def test_each_map_is_of_its_block_and_token_with_colours_symmetric_about_0(weights):
    config = get_config(CONFIG)
    filters = plot_gates.read_filters(config, str(weights))
    assert len(filters) == 4
    images, places = maps(filters, [3, 1], [0, 7])
    assert places == [(0, 0), (1, 3)] * 2
    for image, (layer, token) in zip(images, [(3, 0), (3, 7), (1, 0), (1, 7)]):
        wanted = 1000 * layer + token + 20 * np.arange(16).reshape(4, 4)
        assert np.array_equal(image.get_array(), wanted)
        assert image.get_clim() == (-wanted.max(), wanted.max())


def test_the_sizes_are_the_weights(tmp_path, capsys):
    path = make_weights(tmp_path / "other.pdparams", classes=3, size=42)
    assert called("-pretrained", path, "-output", tmp_path / "a.svg") == 0
    assert "blocks 0, 1, 2, 3 of 4, 10 of 6 x 6 tokens" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_what_does_not_fit_is_refused(weights, tmp_path, capsys):
    output = ["-output", tmp_path / "a.png"]
    given = ["-pretrained", weights, *output]
    assert "has blocks 0 to 3, there is no 4" in refused(capsys, *given, "-layers", "0,4")
    assert "has tokens 0 to 15, there is no -1" in refused(capsys, *given, "-tokens=-1")
    assert "-layers is 'x'" in refused(capsys, *given, "-layers", "x")
    assert "-count is 0" in refused(capsys, *given, "-count", 0)
    both = refused(capsys, *given, "-tokens", "0,5", "-count", 4)
    assert "-tokens says which tokens, and -count how many: give one" in both
    many = ["-layers", ",".join("0" * 40), "-count", 16]
    assert "more than 600 maps" in refused(capsys, *given, *many)
    error = refused(capsys, *given, "-cfg", ROOT / "configs" / "gmlp_ti16_224.yaml")
    assert f"{weights}: these are not this model's weights (wrong -cfg?)" in error
    gone = tmp_path / "gone.pdparams"
    assert f"{gone} does not exist" in refused(capsys, "-pretrained", gone, *output)
    gone.write_bytes(weights.read_bytes()[:5000])
    assert f"{gone} is not an intact .pdparams file" in refused(
        capsys, "-pretrained", gone, *output
    )
    assert ".png or .svg" in refused(capsys, "-pretrained", weights, "-output", weights)
    gate = "mixer_layers.0.mlp_channels.gate.proj.weight"
    for name, value in (("head.bias", np.zeros([2, 2])), (gate, np.ones(3))):
        pdparams.write(gone, {name: paddle.to_tensor(value)})
        assert f"{gone}: is no gMLP's" in refused(capsys, "-pretrained", gone, *output)
    assert not (tmp_path / "a.png").exists()


def test_the_tokens_are_from_all_over_the_image():
    assert plot_gates.all_over(4, 100) == list(range(16))
    assert plot_gates.all_over(14, 1) == [7 * 14 + 7]
    assert plot_gates.all_over(14, 4) == [3 * 14 + 3, 3 * 14 + 10, 10 * 14 + 3, 10 * 14 + 10]
    for side in range(1, 15):
        for wanted in range(1, side * side + 1):
            tokens = plot_gates.all_over(side, wanted)
            assert len(set(tokens)) == wanted and 0 <= min(tokens) <= max(tokens) < side * side
    assert plot_gates.spread(30, 6) == [0, 6, 12, 17, 23, 29]
    assert plot_gates.spread(4, 6) == [0, 1, 2, 3]


def test_help_and_wrong_flags_are_answered_without_paddle(tmp_path):
    for package in ("paddle", "matplotlib"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    command, path = [sys.executable, str(TOOL)], {"PYTHONPATH": str(tmp_path)}
    help_text = run([*command, "-h"], **path).check().out
    for flag in ("-cfg", "-pretrained", "-layers", "-tokens", "-count", "-output"):
        assert flag in help_text
    run([*command, "-cfg", CONFIG], **path).refused(2, "required: -pretrained, -output")


def test_the_overview_figure_has_the_sizes_of_s16():
    config = get_config(ROOT / "configs" / "gmlp_s16_224.yaml")
    mixer, size = config.MODEL.MIXER, config.DATA.IMAGE_SIZE
    tokens, dim = (size // mixer.PATCH_SIZE) ** 2, mixer.EMBED_DIM
    hidden, classes = int(dim * mixer.MLP_RATIO), config.MODEL.NUM_CLASSES
    path = ROOT / "docs" / "figures" / "gmlp.svg"
    root = ElementTree.parse(path).getroot()
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    shapes = {text[text.index("[") :] for text in texts if "[" in text}
    assert shapes == {
        f"[3, {size}, {size}]", f"[{tokens}, {dim}]", f"[{dim}]", f"[{classes}]",
        f"[{tokens}, {hidden}]", f"[{tokens}, {hidden // 2}]",
    }  # fmt: skip
    linear = {tuple(map(int, re.findall(r"\d+", text))) for text in texts if "→" in text}
    assert linear == {(dim, hidden), (hidden // 2, dim), (tokens, tokens), (dim, classes)}
    texts = [text.replace("\N{MULTIPLICATION SIGN}", "x") for text in texts]
    patch = mixer.PATCH_SIZE
    assert f"{mixer.DEPTH} x gMLP block" in texts
    assert f"{patch} x {patch} convolution, stride {patch}" in texts
    assert path.stat().st_size < 20_000
