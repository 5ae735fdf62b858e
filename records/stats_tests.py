"""Is one group of scores really lower than another? Welch's t-test, by scipy."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

RECORD_NATS, RECORD_P = 0.005, 0.01  # a record beats the last one by so much, so surely
MOST_SEEDS = 200


class Comparison(NamedTuple):
    """What can be said about mean(a) - mean(b). p values are None where nothing can be said."""

    difference: float  # negative: a is lower, that is better
    p_two_sided: float | None  # of any difference
    p_margin: float | None  # one-sided: of a being lower by more than the margin


def p_value(a: Sequence[float], b: Sequence[float], alternative: str, margin: float = 0.0,
            more: int = 0) -> float:
    """Return Welch's p of mean(a) against mean(b) - margin, with `more` runs like those of a."""
    from scipy import stats  # type: ignore[import-untyped]  # slow to start: 1 s
    return float(stats.ttest_ind_from_stats(
        statistics.fmean(a), statistics.stdev(a), len(a) + more, statistics.fmean(b) - margin,
        statistics.stdev(b), len(b), equal_var=False, alternative=alternative).pvalue)


def is_testable(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether there are two runs a side, and a spread in one of them."""
    return min(len(a), len(b)) >= 2 and not len(set(a)) == len(set(b)) == 1


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> Comparison:
    """Compare the means of two samples without assuming equal spreads.

    The one-sided test asks whether mean(a) < mean(b) - margin.
    """
    difference = statistics.fmean(a) - statistics.fmean(b)
    if not is_testable(a, b):
        return Comparison(difference, None, None)
    return Comparison(difference, p_value(a, b, "two-sided"), p_value(a, b, "less", margin))


def seeds_to_decide(a: Sequence[float], b: Sequence[float], margin: float,
                    level: float = RECORD_P) -> int | None:
    """Return how many more runs of `a` bring the one-sided p under `level`, or None if none do.

    Taken that means and spreads stay as they are and `b` gets no more runs: published records
    do not. 0: decided already. None too where nothing can be tested.
    """
    if not is_testable(a, b) or statistics.fmean(a) >= statistics.fmean(b) - margin:
        return None
    # one by one: p need not fall with every run, since b's share of the degrees of freedom grows
    return next((more for more in range(MOST_SEEDS + 1)
                 if p_value(a, b, "less", margin, more) < level), None)
