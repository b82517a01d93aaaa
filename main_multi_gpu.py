"""Trains or evaluates gMLP: one process per GPU, or per -nprocs on a CPU.

    python main_multi_gpu.py -cfg configs/gmlp_s16_224.yaml -data_path /dataset/imagenet -amp
    python main_multi_gpu.py -cfg configs/gmlp_s16_224.yaml -data_path /dataset/imagenet -eval \\
        -pretrained gmlp_s16_224.pdparams
"""

import argparse
import difflib
import functools
import os
import signal
import sys
import traceback
import warnings

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # with -P too

try:
    from config import (
        KEYS,
        ConfigWarning,
        get_config,
        require_model,
        show_warnings_of,
        update_config,
    )
    from ranks import host, launch, report
    from utils import UserError, describe_error, prepare_streams
except ModuleNotFoundError as error:
    sys.exit(f"this Python has no package {error.name}: see the README's install section")

# Paddle is imported in run_rank(), after the number of threads is set and only in the processes
# that compute: -h and a wrong flag answer at once.


def build_parser():
    """The command line.  Every flag is one that PaddleViT has, unless its help says new."""
    parser = argparse.ArgumentParser(
        description="Train or evaluate gMLP on an ImageNet-style folder.",
        epilog="Later wins: config.py's defaults, -cfg, the other flags, -opts.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-cfg", metavar="YAML", help="config file, such as configs/gmlp_s16_224.yaml")
    add("-dataset", metavar="NAME", help="the data set's kind (default imagenet2012)")
    add("-data_path", metavar="DIR", help="the data set's folder")
    add("-output", metavar="DIR", help="folder for the runs' own folders (default ./output)")
    add("-batch_size", metavar="N", type=int, help="images per device, in training and evaluation")
    add("-batch_size_eval", metavar="N", type=int, help="images per device in evaluation only")
    add("-image_size", metavar="N", type=int, help="height and width the model sees, pixels")
    add("-accum_iter", metavar="N", type=int, help="batches per optimizer step")
    add(
        "-pretrained",
        metavar="FILE",
        help="weights to evaluate or to start training with; a run's folder: its best",
    )
    add(
        "-resume",
        metavar="FILE",
        help="checkpoint to go on from; auto: the newest under -output; a run's folder: its newest",
    )
    add("-last_epoch", metavar="N", type=int, help="epochs that count as already done")
    add("-eval", action="store_true", help="evaluate only")
    add("-real_labels", metavar="FILE", help="with -eval: the ReaL labels, real.json, too (new)")
    add("-amp", action="store_true", help="mixed precision on GPU (a CPU runs float32)")
    add("-nprocs", metavar="N", type=int, help="processes (new; default: one per GPU, 1 on CPU)")
    add("-num_workers", metavar="N", type=int, help="loader processes per device (new)")
    add("-num_classes", metavar="N", type=int, help="classes of the data set (new)")
    add("-seed", metavar="N", type=int, help="seed of every random draw (new)")
    add("-opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="any config keys, last (new)")
    return parser


def main(argv):
    """Runs the program with its arguments.  Returns the exit status."""
    prepare_streams()
    parser = build_parser()
    if not argv:
        parser.print_usage(sys.stderr)  # what is lacking is told below
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        suggestion = suggest_flag(unknown[0], parser)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    show_warnings_of(parser.prog)
    if report.has_launcher():  # the launcher has printed these
        warnings.simplefilter("ignore", ConfigWarning)
    try:
        config = update_config(get_config(), args)
        require_readable(args)
        require_model(args)
        if config.EVAL and args.resume:
            raise UserError("-eval goes with -pretrained FILE, not with -resume")
        if args.real_labels and not config.EVAL:
            raise UserError("-real_labels FILE goes with -eval")
        host.number_in("OMP_NUM_THREADS", 1)
        is_rank = launch.is_rank()
        if is_rank:
            warning = launch.unused_nprocs(args.nprocs)
        else:
            ranks, gpus, warning = launch.plan_ranks(args.nprocs)
    except (UserError, ConfigWarning) as error:  # a warning under -W error
        report.report_error(f"{parser.prog}: {error}")
        return 2
    if warning:
        print(f"{parser.prog}: {warning}", file=sys.stderr, flush=True)
    if is_rank:
        return run_rank(config)
    return launch.run(ranks, gpus, [sys.executable, os.path.abspath(__file__), *argv])


def suggest_flag(word, parser):
    """What to write instead of a word that is no flag, as the end of a sentence."""
    name, equals, value = word.partition("=")
    if equals and name in KEYS:
        return f"; keys stand after -opts: -opts {name} {value}"
    flags = [flag for action in parser._actions for flag in action.option_strings]
    similar = difflib.get_close_matches("-" + name.lstrip("-").replace("-", "_"), flags, 1)
    return f"; did you mean {similar[0]}?" if similar else ""


def require_readable(args):
    """Raises UserError where -cfg cannot be read by all ranks, each of which does."""
    if args.cfg in ("/dev/stdin", "/dev/fd/0") or (args.cfg and not os.path.isfile(args.cfg)):
        raise UserError(f"-cfg {args.cfg} can be read once, and each rank reads it: give a file")


def run_rank(config):
    """One rank's work.

    Returns:
        The exit status: 0; 1 for what failed while running, 2 for what was asked wrongly; 128 + the
        signal's number where the run was asked to end.
    """
    try:
        host.import_paddle()
        from ranks.loader import explain_dead_workers
        from training.evaluate import evaluate
        from training.run import Run
        from training.state import NonFiniteLoss
        from training.train import Training

        config.freeze()
        run = Run(config)
        program = functools.partial(evaluate, run) if config.EVAL else Training(run).train
    except (UserError, OSError) as error:
        report.report_error(describe_error(error), 2)
        return 2
    except Exception:  # a bug, or a collective that failed because another rank refused
        report.report_error(traceback.format_exc().rstrip())
        return 1
    try:
        with explain_dead_workers():
            return program()
    except (UserError, NonFiniteLoss, OSError) as error:
        message = describe_error(error)
        report.report_error(message, 1)
        run.log.error(message)
    except Exception as error:  # a bug, or a collective that failed because another rank ended
        run.log.error(traceback.format_exc(), extra={"file_only": True})
        report.report_error(f"{type(error).__name__}: {error} (the log has its traceback)")
    return 1


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as it is in what a script starts with &
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; the handlers come later
    sys.exit(main(sys.argv[1:]))
