"""Seeds: every random draw of training is a function of the run's seed and of a place, never of what was drawn before.

Places    batches.py: the epoch; the sample's number in the run · heldout.py: the picture's name
          train_vae.py: the step · adamw.py: step and parameter
Why       a resumed run, and any division of the batch over ranks, draws the same numbers
"""

RUNS, SAMPLES = 1_000_003, 2_654_435_761  # distances between the seeds of two runs; samples outnumber steps


def seed_of(seed: int, place: int, distance: int = RUNS) -> int:
    """The seed of one generator, 0 to 2**32 - 1, from the seed of the run and the place of the draw in it."""
    return (seed * distance + place) % 2**32
