"""Is one group of scores really lower than another? Welch's t-test, by scipy."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

RECORD_NATS, RECORD_P = 0.005, 0.01  # a record beats the last one by so much, so surely
MOST_SEEDS = 1000


class Comparison(NamedTuple):
    """What can be said about mean(a) - mean(b). p values are None where nothing can be said."""

    difference: float  # negative: a is lower, that is better
    p_two_sided: float | None  # of any difference
    p_margin: float | None  # one-sided: of a being lower by more than the margin


def welch(a: Sequence[float], b: Sequence[float], margin: float = 0.0) -> Comparison:
    """Compare the means of two samples without assuming equal spreads.

    The one-sided test asks whether mean(a) < mean(b) - margin. A p value needs two runs a side
    and a spread in one of them.
    """
    difference = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2 or len(set(a)) == len(set(b)) == 1:
        return Comparison(difference, None, None)
    from scipy import stats  # type: ignore[import-untyped]  # slow to start: 1 s
    any_way = stats.ttest_ind(a, b, equal_var=False)
    lower = stats.ttest_ind(a, [value - margin for value in b], equal_var=False,
                            alternative="less")
    return Comparison(difference, float(any_way.pvalue), float(lower.pvalue))


def seeds_to_decide(a: Sequence[float], b: Sequence[float], margin: float,
                    level: float = RECORD_P) -> int | None:
    """Return how many more runs of `a` bring the one-sided p under `level`, or None if none do.

    Taken that means and spreads stay as they are and `b` gets no more runs: published records
    do not. 0: decided already. A sample of one has no spread to go by.
    """
    if min(len(a), len(b)) < 2:
        return None
    from scipy import stats  # type: ignore[import-untyped]  # slow to start: 1 s
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b) - margin
    std_a, std_b = statistics.stdev(a), statistics.stdev(b)
    if mean_a >= mean_b or not std_a + std_b:
        return 0 if mean_a < mean_b else None

    def p_with(more: int) -> float:
        return stats.ttest_ind_from_stats(mean_a, std_a, len(a) + more, mean_b, std_b, len(b),
                                          equal_var=False, alternative="less").pvalue

    if not p_with(MOST_SEEDS) < level:
        return None
    low, high = -1, MOST_SEEDS  # p falls as runs are added, but for a ripple at the smallest counts
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_with(middle) < level else (middle, high)
    return high
