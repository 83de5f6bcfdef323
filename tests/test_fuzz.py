"""Damaged files end in a right result or one clear line; `python tests/fuzz.py` runs all cases."""

import fuzz
import pytest

SHARE = {"weights": 40, "pictures": 60, "listings": 20, "tables": 15, "json": 20, "caches": 8, "checkpoints": 12}


@pytest.mark.parametrize("kind", fuzz.CASES)
def test_damaged_files_end_in_a_right_result_or_one_line(kind):
    outcomes = fuzz.run(kind, seed=1, first=0, count=SHARE[kind])
    assert not [(k, text) for k, text in enumerate(outcomes) if text.startswith("FAULT")]
    # damaged caches are made again, and of damaged checkpoints the one before is used
    results = {text.partition(":")[0] for text in outcomes}
    assert len(outcomes) == SHARE[kind]
    assert results == ({"right"} if kind in ("caches", "checkpoints") else {"right", "refused"})
