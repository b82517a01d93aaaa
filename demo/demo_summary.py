"""Say what a demo run reached: its training's and its evaluation's accuracy have to agree.

python demo/demo_summary.py output/demo-20260101-120000-1234
"""

import argparse
import json
import sys
from pathlib import Path

EXPECTED_ACC1 = 95.0  # percent


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the demo's output folder")
    folder = parser.parse_args().folder
    try:
        (metrics,) = folder.glob("train-*/metrics.jsonl")
        (evaluation,) = folder.glob("eval-*/eval.json")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
        acc1 = json.loads(evaluation.read_text())["acc1"]
        scores = [row for row in rows if row["kind"] == "eval"]
        averaged = [row for row in scores if row["weights"] == "ema"]  # whose scores count
        trained = max(row["acc1"] for row in averaged or scores)
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{folder}: not the output of one training and one evaluation: {error}")
    if acc1 != trained:
        sys.exit(f"evaluation gave Acc@1 {acc1:.2f}, but training reported {trained:.2f}")
    if acc1 < EXPECTED_ACC1:
        sys.exit(f"Acc@1 {acc1:.2f} is below the {EXPECTED_ACC1:.0f} that this demo reaches")
    print(f"Acc@1 {acc1:.2f}")
    print(f"outputs: {metrics.parent} and {evaluation.parent}")
    print(
        "next: DATA_PATH=/your/imagenet PRETRAINED=gmlp_s16_224.pdparams sh run_eval_multi.sh "
        "(docs/training.md)"
    )


if __name__ == "__main__":
    main()
