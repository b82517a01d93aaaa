"""Show a training in VisualDL: its curves over optimizer steps, from `metrics.jsonl`.

    python tools/to_visualdl.py output/train-20260101-12-00-00
    python tools/to_visualdl.py output/train-20260101-12-00-00 -follow
    visualdl --logdir output

Writes `visualdl/` in the run's folder.  -follow goes on with a run that is still writing, or has
not begun to, until Ctrl-C or SIGTERM.  What a run repeated after it was resumed counts once, as it
was last.  Needs visualdl.
"""

import contextlib
import glob
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from utils import SCORES, UserError, cause, new_file

_SECONDS = 5  # from one look at a run to the next; VisualDL's page asks every 15


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    add("-follow", action="store_true", help="wait for the run, and go on while it writes")
    return parser


def work(args):
    """Writes what the arguments say; with -follow, only a signal or an error ends it."""
    signal.signal(signal.SIGTERM, common.leave)
    encode = import_encoder()
    if not args.follow:
        print(f"curves in {update(args.run, encode)}")
        return
    print(f"following {args.run} until Ctrl-C", flush=True)
    state = ()
    while True:
        before, state = state, state_of(common.metrics_path(args.run))
        if state != before:
            with contextlib.suppress(common.NoRows):
                update(args.run, encode)
        time.sleep(_SECONDS)


def import_encoder():
    """A function from the rows of read_metrics to the bytes of a VisualDL file."""
    try:
        from visualdl.component.base_component import meta_data, scalar
        from visualdl.writer.record_writer import RecordWriter
    except Exception as error:  # an OSError too: it writes into the home folder
        reason = f"{type(error).__name__}: {cause(error)}"
        raise UserError(
            f"this needs the package visualdl, which cannot be imported ({reason}): "
            "pip install visualdl==2.5.3"
        ) from None

    def encode(rows):
        # Not by LogWriter, which writes the time of day (the same rows have to make the same bytes)
        # from a thread that keeps a full disk to itself.
        content = io.BytesIO()
        writer = RecordWriter(content)
        writer.write(meta_data(walltime=0).SerializeToString())
        for point in points(rows):
            writer.write(scalar(*point).SerializeToString())
        return content.getvalue()

    return encode


def points(rows):
    """(curve, value, step, milliseconds) of each number in rows of read_metrics that is finite."""
    step = 0
    for row in rows:
        step = row.get("step", step)  # that of a validation is its epoch's
        if row["kind"] == "train":
            group, names = "train", ("loss", "lr", "images_per_second")
        elif row["kind"] == "eval":
            group, names = f"validation_{row['weights']}", SCORES
        else:
            continue
        for name in names:
            value = row.get(name)  # a version of the program may have fewer scores
            if value is not None and math.isfinite(value):
                yield f"{group}/{name}", value, step, round(row["time"] * 1000)


def state_of(path):
    """Something that changes when a file is written to; None where there is no file."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns


def update(run, encode):
    """Brings `visualdl/` up to date with a run.  Returns that folder's path.

    VisualDL reads the last file of a folder by name, on from where it was, and no point can be
    taken back.  So a file only grows; but where a run has repeated points, or another program wrote
    some, a new file takes over, and the old one is emptied.  Several of these tools may run at
    once: they write whole files, of the same bytes.
    """
    metrics = common.metrics_path(run)
    folder = os.path.join(os.path.dirname(metrics), "visualdl")
    paths = sorted(glob.glob(f"{glob.escape(folder)}/vdlrecords.{'[0-9]' * 10}.log"))
    old = Path(paths[-1]).read_bytes() if paths else b""  # before the rows, which only get more
    rows = common.read_run(run)
    try:
        content = encode(rows)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{metrics}: VisualDL cannot show such a number: {error}") from None
    os.makedirs(folder, exist_ok=True)
    grows = paths and content.startswith(old)
    number = int(paths[-1].split(".")[-2]) if paths else 0
    path = paths[-1] if grows else os.path.join(folder, f"vdlrecords.{number + 1:010}.log")
    # Not by a name with vdlrecords in it: an open dashboard would never get over half a record.
    draft = os.path.join(folder, f"draft-{os.getpid()}")
    with new_file(draft) as temporary:
        Path(temporary).write_bytes(content)
    os.replace(draft, path)
    if not grows:
        for each in paths:  # not removed: an open dashboard would end its answers with an error
            os.truncate(each, 0)
        if old:
            print(f"{folder}: what it shows has changed: start an open visualdl again", flush=True)
    return folder


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
