"""Wild list files, YAML files and -opts: thousands from a seed, each loads or is one sentence.

    python tests/fuzz_inputs.py lists FOLDER SEED COUNT
    python tests/fuzz_inputs.py yaml FOLDER SEED COUNT

Prints a JSON object: how many were loaded and refused, what broke the contract (with the case's
number: `case(kind, seed, number)` makes it again), the slowest one's seconds and the process's
largest memory in MB.
"""

import json
import operator
import os
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 2  # of CPU time for one file
MESSAGE_LIMIT = 600  # characters
ADDRESS_SPACE = 4 << 30  # bytes: stops a bomb before the machine suffers

# fmt: off
LABELS = [
    "0", "1", "7", "9", "10", "999", "1000", "-1", "+5", "-0", "007", "1.0", "1e3", "0x1", "1_0",
    "nan", "²", "٣", "None", "2147483646", "2147483647", "2147483648", "4294967295", "9999999999",
    "99999999999", "18446744073709551616", "9" * 5000, "-" * 40, "+-3",
]
GAPS = ["\t", " ", "  \t ", "\x0b", "\x0c", "\r", "\x1c", "\x85", "\xa0", "\u2028", "\0", ",", ""]
PATHS = [
    "a.JPEG", "train/n01440764/n01440764_10026.JPEG", "größe/日本.png", "two words.png", "../x",
    ".", "..", "/", "//", "~", "a/../../b", "$HOME", "%", "{}", "\ud800", "\x1b[31m.png", "a\rb",
    "\0", "x" * 300, "y" * 4096, "🎉" * 1200,
]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"]
SCALARS = [
    "1", "0", "-1", "1.5", "-0.0", "1e999", "-1e999", ".nan", ".inf", "-.inf", "1e-400", "0x1F",
    "0o17", "017", "0b101", "1_000", "1:30", "190:20:30.15", "0b_", "._", "1" + ":1" * 400 + ".5",
    "2021-01-01", "2021-13-45", "2001-12-14t21:59:43.10+99:99", "0001-01-01T00:00:00+23:59",
    "true", "no", "on", "None", "null", "~", "''", '""', "'None'", "'(1,2)'", '"[0.9, 0.95]"',
    "'{[]:1}'", "'1if 2'", "'-1'", "'1j'", "\"b'x'\"", "'...'", r'"\d"', r'"a\nb"', r'"\0"',
    r'"\x"', r'"\ud800"', r'"\e[31m"', r'"\UFFFFFFFF"', "eight", "größe", "日本", "=", "<<",
    "!!int", "!!int ''", "!!float ''", "!!bool x", "!!timestamp x", "!!binary é", "!!binary aGk=",
    "!!null x", "!!str 1", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [{a: 1}]", "!!int [1]",
    "!!str {a: 1}", "!!python/object/apply:os.system [exit 1]", "!!python/tuple [1, 2]",
    "!!python/name:os.system", "! x", "!<tag:a,2000:b> x", "*a", "&a", "&a *a", "[*a]", "{*a : 1}",
    "&a [*a]", "&a {a: *a}", "{<<: *a}", "{<<: {a: 1}}", "[]", "{}", "[1]", "[1, 2]", "[2, 1]",
    "[.5, .5, .5]", "[[1]]", "{a: 1}", "{1: 2}", "{[1]: 2}", "{a: 1, a: 2}", "? 1", "| x", "> x",
    "-", "@", "`", "%", "|", "imagenet2012", "AdamW", "batch", "pixel", "bfloat16", "./output",
]
TOKENS = [
    ": ", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "? ", "| ", "> ", '"', "'", "#", "<<: ",
    "\n", "\n  ", "\n    ", "\t", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "\\", "\r",
    "\x85", "\0", "!!str ", "!!int ", "!!map ", "!!seq ", "BASE: ", "DATA:", "TRAIN:", "MODEL:",
    "SEED: ",
]
# fmt: on


def damage(rng, content):
    """Bytes with a few of them changed, taken out, doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 50])):
        start = rng.randrange(len(content) + 1)
        part = slice(start, start + rng.choice([1, 1, 2, 8, 100]))
        change = rng.randrange(5)
        if change == 0:
            content[part] = rng.randbytes(rng.randrange(1, 4))
        elif change == 1:
            del content[part]
        elif change == 2:
            content[part] = bytes(content[part]) * rng.choice([2, 3, 100])
        elif change == 3:
            content[start:start] = rng.choice(
                [b"\0", b"\xff", b"\r", b"\n", b"\t", b" ", b"9", b":"]
            )
        else:
            end = rng.randrange(len(content) + 1)
            content[end:end] = content[part]
    return bytes(content[: 1 << 16])


def encode(rng, text):
    """Text as bytes, in UTF-8 most of the time; half a surrogate pair as its three bytes."""
    encoding = rng.choice(ENCODINGS) if rng.random() < 0.2 else "utf-8"
    return text.encode(encoding, "surrogatepass" if "utf" in encoding[:3] else "replace")


def list_file(rng):
    """The bytes of a list file, valid or not."""
    real = "".join(f"val/n{i:08d}/{i}.JPEG {i % 10}\n" for i in range(rng.choice([1, 3, 30])))
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 3, 30, 3000, 100_000]))
    if kind == 1:  # one huge line, with or without others and an end
        line = rng.choice([b"\0", b" ", b"x", b"a 1 ", "ü".encode(), b"\r"])
        huge = line * rng.choice([2500, 4999, 5001, 50_000, 1_000_000])
        return (
            rng.choice([b"", real.encode()]) + huge + rng.choice([b"", b" 1", b"\n", b" 1\na 1\n"])
        )
    if kind == 2:  # very many lines
        line = rng.choice(
            ["a.JPEG 1\n", "\n", "a\n", "\r\n", "1 1\n", "\0\n", " \t\n", "a 99999\n"]
        )
        return (line * rng.choice([100, 1000, 1000, 50_000])).encode()
    if kind == 3:
        return encode(rng, real)
    if kind in (4, 5):
        return damage(rng, real.encode())
    lines = []
    for _ in range(rng.choice([1, 1, 2, 5, 100])):
        if rng.random() < 0.5:
            lines.append(rng.choice(PATHS[:4]) + " " + rng.choice(LABELS[:4]))
        else:
            lines.append(
                rng.choice(PATHS) + rng.choice(GAPS) + rng.choice(LABELS) + rng.choice(GAPS)
            )
    return encode(rng, rng.choice(["\n", "\r\n", "\n\n", "\r"]).join(lines))


def yaml_value(rng, depth=3):
    """The text of a value: of any kind, in flow style."""
    kind = rng.random()
    if depth and kind < 0.1:
        return "[" + ", ".join(yaml_value(rng, depth - 1) for _ in range(rng.randrange(5))) + "]"
    if depth and kind < 0.2:
        items = (
            f"{yaml_value(rng, depth - 1)}: {yaml_value(rng, depth - 1)}"
            for _ in range(rng.randrange(4))
        )
        return "{" + ", ".join(items) + "}"
    if kind < 0.25:
        return rng.choice("9f0x[{('&*-+.~") * rng.choice([10, 1000, 10_000])
    if kind < 0.3:
        return str(rng.choice([2**31, 2**63, 2**64, 10**400, -(10**400), rng.uniform(-9, 9)]))
    if kind < 0.33:
        return json.dumps("".join(chr(rng.randrange(0x11000)) for _ in range(rng.randrange(20))))
    return rng.choice(SCALARS)


def yaml_lines(rng, defaults):
    """`SECTION: {NAME: value}` lines of some keys; a section may come twice."""
    lines = []
    for _ in range(rng.choice([1, 1, 2, 5])):
        key = rng.choice(list(defaults))
        *sections, name = key.split(".")
        if rng.random() < 0.05:
            name = rng.choice([name.lower(), name[:-1], name + name, "", "<<", "? " + name])
        text = f"{name}: {yaml_value(rng)}"
        if rng.random() < 0.4:
            text = f"{name}: {json.dumps(defaults[key])}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        lines.append(text)
    return "\n".join(lines) + "\n"


def bomb(rng):
    """Aliases of aliases: a few lines that mean millions of values."""
    kind = rng.choice(["[{}]", "{{k{}}}", "{{<<: [{}]}}", "!!set {{{}}}", "!!omap [{}]"])
    width, depth = rng.choice([2, 9, 50]), rng.choice([3, 9, 40])
    text, last = "a0: &a0 " + rng.choice(["[1, 1]", "{k: 1}", "x"]) + "\n", "a0"
    for level in range(1, depth):
        items = ", ".join([f"*{last}"] * width)
        if "k" in kind:
            items = ", ".join(f"{i}: *{last} " for i in range(width))
            inside = "{" + items + "}"
        else:
            inside = kind.format(items)
        last = f"a{level}"
        text += f"{last}: &{last} {inside}\n"
    return text + rng.choice(["", f"BASE: *{last}\n", f"SEED: *{last}\n", f"DATA: *{last}\n"])


def nesting(rng):
    """Something deep."""
    times = rng.choice([10, 100, 400, 3000, 9000])
    if rng.random() < 0.2:
        return "".join(" " * level + "a:\n" for level in range(min(times, 250)))
    part = rng.choice(
        ["[", "{a: ", "- ", "? ", "[[], ", "&a [", "!!seq [", "{? ", "(", "'(", "-", "!"]
    )
    return rng.choice(["", "SEED: ", "BASE: ", "DATA: {CROP_PCT: "]) + part * times


def bases(rng):
    """BASE entries: itself, each other, odd values."""
    names = [
        "case.yaml",
        "a.yaml",
        "b.yaml",
        "./a.yaml",
        "x/../a.yaml",
        ".",
        "..",
        "/",
        "",
        "*",
        "~",
    ]
    names += ['"\\0"', '"a\\nb"', '"\\ud800"', "y" * 300, "z" * 5000, "3", "null", "[a.yaml]"]
    some = ", ".join(rng.choice(names) for _ in range(rng.choice([1, 1, 2, 3, 60])))
    return f"BASE: [{some}]\n" if rng.random() < 0.8 else f"BASE: {yaml_value(rng)}\n"


def yaml_file(rng, defaults, real):
    """The bytes of a YAML file, valid or not."""
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.choice([0, 1, 3, 30, 3000]))
    if kind == 1:
        return "".join(rng.choice(TOKENS) for _ in range(rng.choice([3, 10, 100]))).encode()
    if kind == 2:
        return damage(rng, rng.choice(real))
    if kind == 3:
        return bomb(rng).encode()
    if kind == 4:
        return nesting(rng).encode()
    if kind == 5:  # long
        part = rng.choice(
            ["a", "a: 1\n", "# x\n", "\n", "- a\n", '"', "a: b: ", "[1, ", "a:,", "&b c\n"]
        )
        return (rng.choice(["", "["]) + part * rng.choice([300, 2000, 9000]))[:40_000].encode()
    if kind == 6:
        return encode(rng, bases(rng) + rng.choice(["", yaml_lines(rng, defaults)]))
    return encode(rng, yaml_lines(rng, defaults))


def opts(rng, keys):
    """Words after -opts."""
    words = []
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice(keys)
        if rng.random() < 0.1:
            key = rng.choice([key.lower(), key[:-1], key.split(".")[0], "", ".", "BASE", "x" * 500])
        words += [key, yaml_value(rng)]
    return words[: -1 if rng.random() < 0.03 else None]


def case(kind, seed, number):
    """The generator that makes one case: rng of its own, so that it can be made alone."""
    return random.Random(f"{kind} {seed} {number}")


def check_message(error, *parts):
    message = str(error)
    if len(message.splitlines()) != 1 or not message.isprintable():
        raise AssertionError(f"not one printable line: {message[:300]!r}")
    if len(message) > MESSAGE_LIMIT:
        raise AssertionError(f"{len(message)} characters: {message[:300]}")
    if not any(part in message for part in parts):
        raise AssertionError(f"names none of {parts}: {message}")


class Lists:
    """Tries list files on ImageList."""

    def __init__(self, folder):
        import datasets

        self.folder, self.datasets = folder, datasets

    def __call__(self, rng):
        """Whether the case's file loads; AssertionError where the contract is broken."""
        content, num_classes = list_file(rng), rng.choice([1, 10, 1000, 2**31 - 1])
        path = os.path.join(self.folder, "list.txt")
        Path(path).write_bytes(content)
        bad_lines = []
        try:
            images = self.datasets.ImageList(self.folder, "list.txt", num_classes)
        except ValueError as error:
            check_message(error, path)
            refused = str(error)
        else:
            refused = None
            self._check_entries(rng, images, content, num_classes)
        # Reading on after a bad line finds the same first one.
        try:
            self.datasets.ImageList(self.folder, "list.txt", num_classes, bad_lines.append)
        except ValueError as error:
            assert not bad_lines and str(error) == refused, (str(error), refused)
        else:
            assert (bad_lines or [None])[0] == refused, (bad_lines[:1], refused)
        for sentence in bad_lines[:20]:
            check_message(sentence, path)
        return refused is None

    def _check_entries(self, rng, images, content, num_classes):
        assert len(images) == len(images.labels) > 0
        assert ((images.labels >= 0) & (images.labels < num_classes)).all()
        lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        dataset = self.datasets.ImageDataset(images, None, 0)
        for index in {0, len(images) - 1, rng.randrange(len(images))}:
            name, label = lines[int(images.place(index).rsplit(":")[-1]) - 1].rsplit(None, 1)
            assert images.image_path(index) == os.path.join(self.folder, name.strip().decode())
            assert int(label) == images.labels[index]
            try:
                dataset.read(index)
            except ValueError as error:
                message = str(error)
                assert message.startswith(f"{images.place(index)}: "), message
                assert message.isprintable(), message


class Yaml:
    """Tries YAML files on get_config and -opts on update_config."""

    def __init__(self, folder):
        import config

        self.folder, self.config = folder, config
        default = config.get_config()
        self.keys = list(config.KEYS)
        self.defaults = {key: operator.attrgetter(key)(default) for key in self.keys}
        self.real = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
        self.real.append(default.dump().encode())

    def __call__(self, rng):
        """Whether the case's file loads; AssertionError where the contract is broken."""
        for name in ("case.yaml", "a.yaml", "b.yaml"):
            content = yaml_file(rng, self.defaults, self.real)
            if name != "case.yaml" and rng.random() < 0.8:
                content = encode(rng, bases(rng))
            Path(self.folder, name).write_bytes(content)
        path = os.path.join(self.folder, "case.yaml")
        loaded = self._try([self.folder, "/: "], self.config.get_config, path)
        words = opts(rng, self.keys)
        parts = ["-opts", *(word for word in words if word in self.keys)]
        args = SimpleNamespace(opts=words)
        self._try(parts, self.config.update_config, self.config.get_config(), args)
        return loaded

    def _try(self, parts, function, *arguments):
        try:
            config = function(*arguments)
        except self.config.ConfigError as error:
            check_message(error, *parts)
            return False
        # What is accepted is a whole configuration, that survives being written down.
        again = Path(self.folder, "again.yaml")
        again.write_text(config.dump())
        assert self.config.get_config(again) == config
        return True


def run(kind, folder, seed, count):
    """Runs this program, so that it is alone in its process; asserts that nothing failed."""
    command = [sys.executable, __file__, kind, str(folder), str(seed), str(count)]
    # Of any other number of threads Paddle warns, and its GPU wheel of a machine without a GPU.
    quiet = {"PYTHONWARNINGS": "ignore:You are using GPU version Paddle", "GLOG_minloglevel": "2"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", **quiet}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", done.stderr
    result = json.loads(done.stdout)
    # Both ends of the contract were tried.
    assert min(result["loaded"], result["refused"]) > count / 20, result


def main(kind, folder, seed, count):
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    warnings.filterwarnings("ignore", message="No ccache found")
    attempt = {"lists": Lists, "yaml": Yaml}[kind](folder)
    loaded, failures, slowest = 0, [], (0.0, None)
    for number in range(int(count)):
        start = time.process_time()
        try:
            loaded += attempt(case(kind, seed, number))
        except BaseException as error:
            failures.append(f"case {kind} {seed} {number}: {type(error).__name__}: {error}"[:500])
        seconds = time.process_time() - start
        slowest = max(slowest, (seconds, number))
        if seconds > SECONDS:
            failures.append(f"case {kind} {seed} {number}: {seconds:.1f} s")
    # Not getrusage's ru_maxrss: that begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    memory = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) >> 10
    result = {
        "loaded": loaded,
        "refused": int(count) - loaded,
        "failures": len(failures),
        "first_failures": failures[:10],
        "slowest": [round(slowest[0], 2), slowest[1]],
        "memory_mb": memory,
    }
    print(json.dumps(result, indent=2))
    return 1 if failures or memory > 1000 else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
