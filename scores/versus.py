"""Two sets of pictures of the same prompts, metric by metric: paired differences and win rates.

Difference  B - A of the set's figures; 95 % interval: percentiles of 2000 bootstrap samples of pairs
Win         a pair whose picture of B scores better; ties are left out. 95 % interval: Wilson's of a binomial rate
"""

from collections.abc import Callable, Sequence

import numpy as np

from scores.detail import GLCM, ratio_of_sums
from scores.grid import PHOTOGRAPHS
from scores.intervals import bootstrap_rows, wilson

VERSUS_COLUMNS = {"metric": "", "better": "", "a": ".4f", "b": ".4f", "b_minus_a": ".4f", "low": ".4f", "high": ".4f",
                  "b_wins": "d", "of": "d", "rate": ".3f", "rate_low": ".3f", "rate_high": ".3f"}


def versus(metric: str, better: str, a: Sequence[float], b: Sequence[float], of_set: Callable = np.mean,
           parts: tuple[Sequence, Sequence] | None = None) -> dict:
    """The row of a metric.

    better  "higher" or "lower"
    a, b    scores of the pictures, in the same order
    of_set  the figure of a set, from its scores or its `parts`, (N, K)
    """
    scores = np.array([a, b], dtype=np.float64)
    sides = scores if parts is None else np.array(parts, dtype=np.float64)
    totals = [float(of_set(side)) for side in sides]
    low, high = bootstrap_rows(lambda pairs: of_set(pairs[:, 1]) - of_set(pairs[:, 0]), sides.swapaxes(0, 1))
    gain = (scores[1] - scores[0]) * (1 if better == "higher" else -1)
    wins, decided = int((gain > 0).sum()), int((gain != 0).sum())
    rate_low, rate_high = wilson(wins, decided)
    return {"metric": metric, "better": better, "a": totals[0], "b": totals[1], "b_minus_a": totals[1] - totals[0],
            "low": low, "high": high, "b_wins": wins, "of": decided,
            "rate": wins / decided if decided else np.nan, "rate_low": rate_low, "rate_high": rate_high}


def versus_details(pairs: Sequence[tuple[dict, dict]]) -> list[dict]:
    """The rows of what scores/detail.py measures, of pairs of its rows."""
    a, b = zip(*pairs, strict=True)
    rows = [versus(name, "higher", *([row[name] for row in side] for side in (a, b))) for name in GLCM]
    sizes = tuple([(row["raw_bytes"], row["jpeg_bytes"]) for row in side] for side in (a, b))
    rows.append(versus("ratio", "lower", *([row["ratio"] for row in side] for side in (a, b)), ratio_of_sums, sizes))
    for name in PHOTOGRAPHS:
        if both := [(x[name], y[name]) for x, y in pairs if name in x and name in y]:
            rows.append(versus(name, "lower", *zip(*both, strict=True), np.median))
    return rows
