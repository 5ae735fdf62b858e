"""Say whether two groups of runs differ: scores, significance, settings; and draw them.

    records.py compare NEW… -- OLD…      NEW is judged against OLD

Compared is the score that all runs end in. Where they end in different ones it is the last that
all of them have, of round trip, sliding, test-time training, slot and n-gram. The record rule of
the challenge asks that NEW be lower by 0.005 nats a token at p < 0.01 (one-sided Welch).
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logs import STAGE_ORDER, LogError, Run
from read import read_pair
from stats_tests import RECORD_NATS, RECORD_P, Comparison, seeds_to_decide, welch
from summary import mean_and_std, names_of

# Settings that tell runs of one configuration apart.
OWN_TO_A_RUN = {"seed", "run_id", "input_path", "logfile", "model_path", "quantized_model_path"}
SAME_TOKENIZER = 1e-3  # bytes a token differ by less than this share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", nargs="+", metavar="NEW", type=Path, help="logs of the new runs")
    parser.add_argument("--against", nargs="+", metavar="OLD", type=Path, required=True,
                        help="logs of the old runs; -- is short for it")
    parser.add_argument("--names", nargs=2, default=("new", "old"), metavar=("NEW", "OLD"),
                        help="what to call the groups")
    parser.add_argument("--figure", type=Path, metavar="PATH",
                        help="draw loss and bpb against step, tokens and seconds: "
                             "PATH.png and PATH.svg")
    parser.add_argument("--all-settings", action="store_true",
                        help="list settings that only one side logs, too")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")


def rewrite(argv: Sequence[str]) -> list[str]:
    """Return the arguments with the first `--` as the option it is short for."""
    at = list(argv).index("--") if "--" in argv else len(argv)
    return [*argv[:at], *["--against"] * (at < len(argv)), *argv[at + 1:]]


def check_names(names: Sequence[str]) -> None:
    """Raise LogError where two groups have one name: one would stand for both."""
    if names[0] == names[1]:
        raise LogError(f"--names {' '.join(names)}: give two different names")


def final_scores(runs: Sequence[Run], kind: str) -> list[float]:
    """Return each run's bpb of `kind`; raises LogError where one has none."""
    scores = [run.bpb(kind) for run in runs]
    if lacking := [str(run.path) for run, score in zip(runs, scores) if score is None]:
        raise LogError(f"{lacking[0]}: has no {kind} score, which the other runs are compared by; "
                       "leave it out or give its whole log")
    return [score for score in scores if score is not None]


def common_kind(runs: Sequence[Run]) -> str:
    """Return the score that the runs are compared by: the last that all of them have."""
    finals = {run.final for run in runs}
    order = finals if len(finals) == 1 else reversed(STAGE_ORDER)
    for kind in order:
        if kind and all(run.bpb(kind) is not None for run in runs):
            return kind
    worst = next((run for run in runs if run.final is None), runs[0])
    raise LogError(f"{worst.path}: no final score that all runs have (it has: "
                   f"{', '.join(worst.scores) or 'none'}); leave it out or give its whole log")


def bytes_per_token(run: Run, kind: str) -> float | None:
    """Return UTF-8 bytes a token of the scored text, from a score's two forms."""
    score = run.scores[kind]
    return score.loss / math.log(2) / score.bpb if score.loss and score.bpb else None


def share_tokenizer(runs: Sequence[Run], kind: str) -> bool | None:
    """Return whether the scored tokens of all runs stand for equally many bytes; None: unknown."""
    sizes = [bytes_per_token(run, kind) for run in runs]
    known = [size for size in sizes if size]
    return None if len(known) < len(sizes) else \
        max(known) - min(known) <= SAME_TOKENIZER * min(known)


def in_nats(new: Sequence[Run], old: Sequence[Run], kind: str) -> tuple[list, list, str] | None:
    """Return both groups' scores in nats a token, and how they were got; None if unknown.

    Tokens of two vocabularies are no common measure: then bpb times the old runs' bytes a token.
    """
    same = share_tokenizer([*new, *old], kind)
    if same is None:
        return None
    if same:
        return ([run.scores[kind].loss for run in new], [run.scores[kind].loss for run in old],
                "nats a token, as logged")
    factor = statistics.fmean(bytes_per_token(run, kind) or 0.0 for run in old) * math.log(2)
    return ([factor * value for value in final_scores(new, kind)],
            [factor * value for value in final_scores(old, kind)],
            f"nats a token of the old runs ({factor / math.log(2):.4f} bytes each): the "
            "tokenizers differ")


def values_of(runs: Sequence[Run], name: str) -> str:
    """Return a setting's values in a group as text: "-" where no log states it."""
    found = dict.fromkeys(run.config.get(name, "-") for run in runs)
    return " | ".join(text or '""' for text in found)


def differing_settings(new: Sequence[Run], old: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Return {setting: (new, old)} of those whose values differ, between or inside the groups."""
    names = sorted({name for run in (*new, *old) for name in run.config} - OWN_TO_A_RUN)
    pairs = {name: (values_of(new, name), values_of(old, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or " | " in pair[0]}


def analyse(new: Sequence[Run], old: Sequence[Run]) -> dict[str, Any]:
    """Return everything that is said about two groups of runs."""
    kind = common_kind([*new, *old])
    bpb = final_scores(new, kind), final_scores(old, kind)
    nats = in_nats(new, old, kind)
    found: dict[str, Any] = dict(
        score=kind, finals=sorted({run.final or "" for run in (*new, *old)}),
        runs=[len(new), len(old)], bpb=bpb,
        mean_bpb=[statistics.fmean(values) for values in bpb],
        std_bpb=[mean_and_std(values)[1] for values in bpb],
        same_tokenizer=share_tokenizer([*new, *old], kind),
        test_bpb=welch(bpb[0], bpb[1])._asdict(), test_nats=None, unit=None, more_seeds=None,
        settings=differing_settings(new, old))
    if nats:
        a, b, unit = nats
        test = welch(a, b, RECORD_NATS)
        found.update(test_nats=test._asdict(), unit=unit, record=is_record(test),
                     more_seeds=seeds_to_decide(a, b, RECORD_NATS))
    return found


def is_record(test: Comparison) -> bool | None:
    """Return whether a difference in nats fulfils the record rule; None: nothing can be said."""
    return None if test.p_margin is None else test.p_margin < RECORD_P


def shown_p(value: float | None) -> str:
    return "n/a (needs two runs a side, and a spread)" if value is None else f"{value:.3g}"


def ruling(found: dict[str, Any]) -> str:
    """Return the record rule's outcome in words."""
    rule = f"lower by {RECORD_NATS} nats at p < {RECORD_P}"
    if found["test_nats"] is None:
        return f"n/a   {rule}: a log does not state its loss in nats"
    p, more = found["test_nats"]["p_margin"], found["more_seeds"]
    if found["record"] is None:
        return f"n/a   {rule}: p is {shown_p(p)}"
    rule += "" if found["same_tokenizer"] else " (converted: the tokenizers differ)"
    if found["record"]:
        return f"ok    {rule}: p = {p:.3g}"
    outlook = f"{more} more new runs would decide it" if more else \
        "no number of new runs would change that"
    return f"FAIL  {rule}: p = {p:.3g}; if means and spreads stay as they are, {outlook}"


def score_words(found: dict[str, Any]) -> str:
    """Return which score is compared, and where runs have another final one."""
    others = [kind or "none" for kind in found["finals"] if kind != found["score"]]
    return found["score"] + (f" (the last that all have; some end in {', '.join(others)})"
                             if others else "")


def report(found: dict[str, Any], names: Sequence[str], all_settings: bool) -> str:
    """Return the page."""
    lines = [f"score: {score_words(found)}, bits per byte"]
    if found["same_tokenizer"] is False:
        lines.append("the tokenizers differ: compared in bits per byte; nats are converted")
    for i, name in enumerate(names):
        std = found["std_bpb"][i]
        lines.append(f"  {name:12} mean {found['mean_bpb'][i]:.8f}  std "
                     f"{'-' if std is None else format(std, '.8f'):>10}  of {found['runs'][i]}: "
                     + " ".join(f"{value:.8f}" for value in found["bpb"][i]))
    test = found["test_bpb"]
    lines.append(f"  difference   {test['difference']:+.8f} bpb (negative: {names[0]} is better), "
                 f"Welch two-sided p {shown_p(test['p_two_sided'])}")
    if found["test_nats"]:
        lines.append(f"               {found['test_nats']['difference']:+.8f} {found['unit']}")
    lines += [ruling(found), ""]
    pairs = found["settings"]
    one_sided = [name for name, pair in pairs.items() if "-" in pair]
    listed = {name: pair for name, pair in pairs.items() if all_settings or name not in one_sided}
    rows = [("setting", *names), *((name, *pair) for name, pair in listed.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
              for row in rows] if listed else ["no setting that both sides log differs"]
    if one_sided and not all_settings:
        lines.append(f"({len(one_sided)} more that only one side logs: --all-settings)")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    check_names(args.names)
    new, old, notes = read_pair(args.new, args.against)
    found = analyse(new, old)
    if args.json:
        print(json.dumps(dict(found, names=[names_of(new), names_of(old)], notes=notes), indent=1))
    else:
        print(report(found, args.names, args.all_settings))
        print("\n".join(f"note: {note}" for note in notes), end="\n" * bool(notes))
    if args.figure:
        from figures import draw_comparison  # matplotlib starts slowly
        for path in draw_comparison(dict(zip(args.names, (new, old))), args.figure):
            print(f"figure: {path}")
    return 0
