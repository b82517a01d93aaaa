"""What benchmark.py's subcommands work with: workers, turns, tables, images."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also under -m and -P

from config import ConfigError, get_config
from ranks import host
from tools import common

TOOLS = Path(__file__).resolve().parent
DEFAULT_CFG = str(common.ROOT / "configs" / "gmlp_s16_224.yaml")
PHOTOGRAPHS = ("landscape_500x375.jpg", "portrait_333x500.jpg")


class Entry(NamedTuple):
    """Something to measure: role is "ours", "peer" or "limit", measure() gives its answer."""

    name: str
    role: str
    measure: Callable[[], dict]


class Group(NamedTuple):
    """Entries measured in turn: the first is what the others are compared with."""

    title: str
    entries: list


class Worker:
    """A process that prepares cases and runs them when asked (benchmark_worker.py)."""

    def __init__(self, name, command, threads):
        self.name = name
        count = str(threads)
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
        env.update(CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
        try:
            self._process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is the benchmark's to answer
            )
        except OSError as error:
            raise ConfigError(f"{command[0]} cannot be started: {error.strerror}") from error

    def versions(self):
        """What it is made of, by package; it has started then."""
        return self._ask(case="versions", options={})["facts"]

    def prepare(self, case, **options):
        """A function that runs one repetition; its attribute `facts` is what the case told."""
        answer = self._ask(case=case, options=options)

        def measure():
            return self._ask(run=answer["key"])

        measure.facts = answer["facts"]
        return measure

    def _ask(self, **request):
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise common.Failed(f"{self.name} has ended (exit status {status}); see above")
        answer = json.loads(line)
        if "error" in answer:
            raise common.Failed(f"{self.name}: {answer['error']}")
        return answer

    def close(self):
        """Ends the process, in the middle of a repetition too."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        for end in (self._process.terminate, self._process.kill):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
                return
            end()
        self._process.wait()


class Bench:
    """The workers, images and results of one run of the program."""

    def __init__(self, args, folder, stack):
        self.args, self.folder, self._stack = args, folder, stack
        self.config = get_config(getattr(args, "cfg", DEFAULT_CFG))
        self.threads = getattr(args, "threads", None) or host.available_cores()
        self.versions, self.results = {}, []
        self.load = os.getloadavg()

    def ours(self, threads=None, ranks=1):
        command = [sys.executable, str(TOOLS / "ours.py"), str(ranks)]
        return self._start("ours", command, threads or max(1, self.threads // ranks))

    def peer(self, threads=None):
        """A worker of the peer; None where there is none."""
        if not self.args.peer:
            return None
        threads = threads or self.threads
        command = [self.args.peer, str(TOOLS / "peer.py"), str(threads)]
        return self._start("peer", command, threads)

    def _start(self, name, command, threads):
        worker = Worker(name, command, threads)
        self._stack.callback(worker.close)
        self.versions[name] = worker.versions()
        return worker

    def timm_model(self):
        """timm's name, images and number of classes of the config's model."""
        config = self.config
        return {
            "model": config.MODEL.NAME,
            "images": self.images(),
            "num_classes": config.MODEL.NUM_CLASSES,
        }

    def images(self):
        """How the config has images, for timm."""
        data = self.config.DATA
        return {
            "size": data.IMAGE_SIZE,
            "crop_pct": data.CROP_PCT,
            "mean": list(data.IMAGENET_MEAN),
            "std": list(data.IMAGENET_STD),
        }

    def recipe(self):
        """What of the config's recipe a training step spends time on, for timm."""
        train = self.config.TRAIN
        optimizer = train.OPTIMIZER
        return {
            "drop_path": self.config.MODEL.DROPPATH,
            "grad_clip": train.GRAD_CLIP,
            "mixup": {
                "mixup_alpha": train.MIXUP_ALPHA,
                "cutmix_alpha": train.CUTMIX_ALPHA,
                "prob": train.MIXUP_PROB,
                "switch_prob": train.MIXUP_SWITCH_PROB,
                "label_smoothing": train.SMOOTHING,
            },
            "adamw": {
                "lr": 1e-5,
                "betas": list(optimizer.BETAS),
                "eps": optimizer.EPS,
                "weight_decay": train.WEIGHT_DECAY,
            },
        }

    def measure(self, group):
        """Takes turns, prints the group's table and keeps it."""
        from tqdm import tqdm

        args = self.args
        answers = [[] for _ in group.entries]
        turns = args.warmup + args.repetitions
        with tqdm(total=turns * len(answers), leave=False, disable=not sys.stderr.isatty()) as bar:
            bar.set_description(group.title[:40])
            for turn in range(turns):
                for entry, of_entry in zip(group.entries, answers):
                    answer = entry.measure()
                    if turn >= args.warmup:
                        of_entry.append(answer)
                    bar.update()
        result = {"title": group.title, "rows": summarize(group, answers)}
        self.results.append(result)
        show(result["title"], *timing_table(result["rows"]))
        return result

    def add(self, title, rows, header, cells):
        """Prints and keeps a table that is no timing."""
        self.results.append({"title": title, "rows": rows})
        show(title, header, cells)


def summarize(group, answers):
    """A dict per entry: its seconds, their median, images/s, and the first entry's speed / its."""
    reference = [answer["seconds"] / answer.get("images", 1) for answer in answers[0]]
    rows = []
    for entry, of_entry in zip(group.entries, answers):
        seconds = [answer["seconds"] for answer in of_entry]
        images = of_entry[0].get("images")
        each = [second / (images or 1) for second in seconds]
        rows.append(
            {
                "name": entry.name,
                "role": entry.role,
                "seconds": [round(second, 5) for second in seconds],
                "median": statistics.median(seconds),
                "lowest": min(seconds),
                "highest": max(seconds),
                "images": images,
                "images_per_second": images and statistics.median(1 / one for one in each),
                "ratio": statistics.median(own / ref for own, ref in zip(each, reference)),
            }
        )
    return rows


def timing_table(rows):
    """(header, cells) of summarize()'s rows."""
    header = ["", "seconds", "lowest to highest", "images/s", "ours / this"]
    cells = []
    for row in rows:
        rate = row["images_per_second"]
        cells.append(
            [
                row["name"],
                f"{row['median']:.3f}",
                f"{row['lowest']:.3f} to {row['highest']:.3f}",
                f"{rate:.1f}" if rate else "",
                "" if row is rows[0] else f"{row['ratio']:.2f}",
            ]
        )
    return header, cells


def show(title, header, cells):
    """Prints a table: the first column is text, the others are numbers."""
    lines = [header, *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    print(f"\n{title}")
    for line in lines:
        rest = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))
        print("  ".join([line[0].ljust(widths[0]), *rest]).rstrip())
    sys.stdout.flush()


def make_images(folder, count):
    """JPEGs of 500x375 from the photographs of the tests, each another part of one; their paths."""
    import numpy as np
    from PIL import Image, ImageOps

    photographs = [
        Image.open(common.ROOT / "tests" / "data" / "images" / name).convert("RGB")
        for name in PHOTOGRAPHS
    ]
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        image = photographs[number % len(photographs)]
        width, height = ImageOps.contain(Image.new("1", (500, 375)), image.size).size
        share = rng.uniform(0.8, 1)
        width, height = int(share * width), int(share * height)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        image = image.crop((left, top, left + width, top + height)).resize((500, 375), 3)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        paths.append(os.path.join(folder, f"{number}.jpg"))
        image.save(paths[-1], quality=95)
    return paths


def prepare_images(bench, lines=0):
    """Writes lists of the benchmark's images into its folder, in turn up to `lines`.

    Returns:
        The images' paths, each once.
    """
    args = bench.args
    if getattr(args, "data_path", None):
        paths = _listed(args.data_path, args.images)
    else:
        paths = make_images(bench.folder, getattr(args, "images", 16))
    text = "".join(f"{paths[i % len(paths)]} 0\n" for i in range(max(lines, len(paths))))
    for name in ("train_list.txt", "val_list.txt"):
        with open(os.path.join(bench.folder, name), "w") as file:
            file.write(text)
    return paths


def _listed(folder, count):
    """The first images of a user's folder, which can be read; raises DataError otherwise."""
    common.import_paddle()
    from datasets import ImageDataset, ImageList

    any_label = 10**9
    images = ImageList(folder, "val_list.txt", any_label)
    indices = range(min(count, len(images)))
    for index in indices:
        ImageDataset(images, None, 0).read(index)
    return [os.path.abspath(images.image_path(index)) for index in indices]


def describe_machine(bench):
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        model = next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    return {
        "cpu": model,
        "cores": host.available_cores(),
        "load before": f"{bench.load[0]:.1f}",
    }
