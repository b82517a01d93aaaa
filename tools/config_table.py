"""Print every configuration key as Markdown tables, made from config.py.

    python tools/config_table.py
    python tools/config_table.py -update     # writes them into docs/config.md

A key's meaning is the comment beside it in config.py, or the lines above it.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import FLAGS, KEYS, describe_range
from utils import new_file

PAGE = common.ROOT / "docs" / "config.md"
_BEGIN, _END = "<!-- python tools/config_table.py -update -->\n", "<!-- end -->\n"
_KINDS = {int: "whole number", float: "number", bool: "`True` or `False`", str: "text"}
_HEAD = "| key | default | takes | meaning |\n| --- | --- | --- | --- |\n"


def build_parser():
    parser = common.Parser(__doc__)
    parser.add_argument("-update", action="store_true", help="write the tables into docs/config.md")
    return parser


def work(args):
    """Prints the tables, or writes them into their page."""
    if not args.update:
        print(tables(), end="")
        return
    page = PAGE.read_text()
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    with new_file(PAGE) as path:
        Path(path).write_text(f"{before}{_BEGIN}\n{tables()}\n{_END}{after}")


def tables():
    """A table for each section of the keys, in config.py's order; those without a section last."""
    texts, sections = meanings(), {}
    for key in KEYS:
        section = key.split(".")[0] if "." in key else "Without a section"
        sections.setdefault(section, []).append(_row(key, texts[key]))
    return "\n".join(f"### {name}\n\n{_HEAD}{''.join(rows)}" for name, rows in sections.items())


def meanings():
    """What config.py's comments say of each key."""
    found, above = {}, []
    for line in (common.ROOT / "config.py").read_text().splitlines():
        entry = re.match(r'    "([\w.]+)": .+?,(?:  # (.+))?$', line)
        if entry and entry[1] in KEYS:
            found[entry[1]] = " ".join(filter(None, [*above, entry[2]]))
        comment = re.match(r"    # (.+)", line)
        above = [*above, comment[1]] if comment else []
    return found


def _row(key, meaning):
    flags = [f"`-{flag}`" for flag, keys in FLAGS.items() if key in keys]
    meaning = meaning.replace("<", "&lt;")  # Markdown would take <n> for a tag
    shown = " ".join([f"`{key}`", *flags])
    return f"| {shown} | `{KEYS[key].default}` | {_takes(KEYS[key])} | {meaning} |\n"


def _takes(spec):
    """The values of a key in words."""
    if spec.choices:
        words = " or ".join(f"`{choice}`" for choice in spec.choices)
    elif spec.length:
        words = "names" if spec.kind is str else f"{spec.length} numbers"
    else:
        words = _KINDS[spec.kind]
    if spec.low is not None:
        words += f", {'each ' if spec.length else ''}{describe_range(spec)}"
    return f"{words}, or `None`" if spec.none else words


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
