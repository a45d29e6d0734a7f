"""Evaluations with given scores, for tests of what is made of them."""

import numpy as np

from sammix_jax.evaluation.results import Evaluation, Example, collect
from sammix_jax.evaluation.scores import Case, Guidance

DICES = {"v-1": 0.71, "v-2": 0.83, "v-3": 0.92, "v-4": 0.85}


def case(scan, protocol, dice, status="scored"):
    return Case(scan, protocol, status, dice, dice, 8.0, 1.0, -0.1, dice, 7.0, 0.5, 1500, 1400)


def example(case):
    mask = np.zeros((32, 32), bool)
    mask[8:20, 6:16] = True
    box = np.array([4.0, 8.0, 20.0, 24.0])
    hu = np.where(mask, 60, -900).astype(np.int16)
    cam = np.where(mask, 1.0, 0.1)
    predicted = np.roll(mask, 2, axis=1)
    return Example(case, 4, hu, mask, predicted, cam, box, np.array([6.0, 8.0, 16.0, 20.0]))


def evaluation(run, dices, config, faults=(), trained_on=()):
    cases = [case(n, p, d) for n, d in dices.items() for p in ("cam", "gt_box")]
    guidance = Guidance(np.array([True, False]), np.array([0.9, 0.2]), np.ones(1), np.zeros(1))
    digests = dict.fromkeys(dices, "digest")
    results = collect(config, run, cases, [guidance], faults, trained_on, digests, [], 40)
    return Evaluation(cases, results, [example(c) for c in cases if c.protocol == "cam"])
