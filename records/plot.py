"""Draw one run: loss, learning rate, gradient norm, step time, where recurrence starts, scores.

RUN is a text log, an events.jsonl or a run's folder. What its log does not state is named below
the figure instead of drawn empty. Writes PATH.png and PATH.svg.
"""

import argparse
from pathlib import Path

from figures import draw_run
from logs import find_log, read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="PATH",
                        help="default: LOG_training beside the log")


def run(args: argparse.Namespace) -> int:
    log = find_log(args.run)
    for path in draw_run(read_run(log), args.out or log.with_name(f"{log.stem}_training")):
        print(f"figure: {path}")
    return 0
