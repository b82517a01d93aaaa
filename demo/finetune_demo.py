"""Fine-tuning on real images, in minutes: from digits 0-4 to digits 5-9.

    python demo/finetune_demo.py -output output/finetune

Trains the demo's model on the digits 0-4, then on 5-9 from scratch, from the weights of 0-4, and
from those with all but the head frozen.  Prints each command, to be copied, and Acc@1 on the
validation digits 5-9 after each epoch.  -output gets the lists (digits_0-4, digits_5-9) and the
runs' folders (pretrained, scratch, finetuned, frozen).  Exit status: 0, 1 where a run failed, 2 for
what was asked wrongly.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also under -m and -P

from tools import common
from config import ConfigError
from ranks import launch

_CONFIG = os.path.join("configs", "gmlp_digits_finetune.yaml")
# What -opts says of each run on the digits 5-9; all but "scratch" start from the weights of 0-4.
_RUNS = {
    "scratch": [],
    "finetuned": ["TRAIN.LAYER_DECAY", "0.8"],
    "frozen": ["TRAIN.FREEZE_BACKBONE", "True"],
}


def build_parser():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add(
        "-output",
        metavar="DIR",
        default="output/finetune",
        help="a new folder (default: %(default)s)",
    )
    add("-epochs", metavar="N", type=int, default=5, help="epochs on the digits 5-9 (default 5)")
    add("-pretrain_epochs", metavar="N", type=int, default=6, help="on 0-4 (default 6)")
    add("-seed", metavar="N", type=int, default=0, help="of every run (default 0)")
    return parser


def work(args):
    """Runs the demo that the arguments ask for."""
    signal.signal(signal.SIGTERM, common.leave)  # so that the run that is on ends too
    for flag in ("epochs", "pretrain_epochs"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"-{flag} is {getattr(args, flag)}, it must be at least 1")
    if args.seed < 0:
        raise ConfigError(f"-seed is {args.seed}, it must be at least 0")
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output}: this is no folder: give -output the name of a new one")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output}: there are files in it already: give -output a new folder")
    make_lists(output)
    folder = train(output, "pretrained", args.seed, 5, args.pretrain_epochs, "digits_0-4", [])
    weights = ["-pretrained", str(folder / "best_weights.pdparams")]
    curves = {}
    for name, opts in _RUNS.items():
        words = [*(weights if name != "scratch" else []), "-opts", *opts]
        folder = train(output, name, args.seed, 10, args.epochs, "digits_5-9", words)
        curves[name] = accuracies(folder)
    print(f"\nAcc@1 on the digits 5-9\n{'epoch':>5}" + "".join(f"{name:>12}" for name in curves))
    for epoch, row in enumerate(zip(*curves.values()), 1):
        print(f"{epoch:>5}" + "".join(f"{value:>12.2f}" for value in row))


def make_lists(output):
    """The two halves of the digits, as two data sets of the same images' folder."""
    from demo.make_digits import make_digits

    digits = output / "digits"
    make_digits(digits)
    for name, labels in (("digits_0-4", "01234"), ("digits_5-9", "56789")):
        (output / name).mkdir()
        for split in ("train", "val"):
            lines = (digits / f"{split}_list.txt").read_text().splitlines(keepends=True)
            kept = [f"../digits/{line}" for line in lines if line.strip()[-1] in labels]
            (output / name / f"{split}_list.txt").write_text("".join(kept))


def train(output, name, seed, classes, epochs, data, words):
    """Runs the program once.  Returns the run's folder.

    Raises:
        common.Failed: the run ended with an error, which it has printed.
    """
    command = ["python", "main_multi_gpu.py", "-cfg", _CONFIG, "-data_path", str(output / data),
               "-output", str(output / name), "-num_classes", str(classes), "-seed", str(seed),
               *(["-nprocs", "2"] if launch.count_gpus() == 0 else [])]  # fmt: skip
    if "-opts" not in words:
        words = [*words, "-opts"]
    command += [*words, "TRAIN.NUM_EPOCHS", str(epochs)]
    print(shlex.join(command), flush=True)
    # Paths are those of the folder where the tool was started.
    command[:4] = [sys.executable, common.ROOT / command[1], "-cfg", common.ROOT / _CONFIG]
    with open(output / f"{name}.txt", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = run.wait()
        finally:  # SIGTERM or Ctrl-C to this tool: the run ends in good order too
            if run.poll() is None:
                run.terminate()
                run.wait()
    if status:
        raise common.Failed(
            f"{output / name}.txt: the run ended with exit status {status}; see there"
        )
    (folder,) = (output / name).glob("train-*")
    print(f"outputs in {folder}", flush=True)
    return folder


def accuracies(folder):
    """Acc@1 after each epoch of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["acc1"] for row in rows if row["kind"] == "eval"]


if __name__ == "__main__":
    sys.exit(common.run(build_parser(), work))
