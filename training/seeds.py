"""Which random numbers each part of a run draws: streams named by what they are for, never by what ran before.

A stream is a function of the run's seed, its purpose and a few counters. Nothing has to be saved to continue it, and no
process can disturb another's numbers.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    INITIAL_PARAMETERS = 1
    ENVIRONMENT = 2
    ACTIONS = 3
    MINIBATCHES = 4
    EVALUATION = 5
    EVALUATION_ENVIRONMENT = 6
    EVALUATION_ACTIONS = 7
    OBSERVATION_NOISE = 8
    TUNING = 9
    PERTURBATION = 10


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """Return the generator of a stream; equal arguments give equal numbers in every process."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *counters])))


def derived_seed(seed: int, stream: Stream, *counters: int) -> int:
    """Return a 31-bit seed for what only takes an integer, such as `env.reset`."""
    return int(np.random.SeedSequence([seed, stream, *counters]).generate_state(1)[0] >> 1)
