"""The largest batch that fits, under each choice that trades memory for time."""

import itertools
import math

from tqdm import tqdm

from sammix_jax.models.remat import POLICIES
from sammix_jax.plan import GIB, StepPlan, Target, plan_train
from sammix_jax.sam_mix import DTYPES

WHOLE = 2**20  # more queries than any grid has: attention is not cut in chunks


def sweep(config, target: Target):
    """Tries compute types, what is recomputed and how attention goes.

    Quotas grow together, in the config's proportion, in steps that all devices share.

    Yields:
      (options, plan): the fields that were set, with the largest batch; and its plan, None where
      not even the smallest batch fits.
    """
    choices = [
        {"model.dtype": dtype, "model.remat": remat, "model.query_chunk": chunk}
        for dtype, remat, chunk in itertools.product(
            DTYPES, POLICIES, (config.model.query_chunk, WHOLE)
        )
    ]
    for options in tqdm(choices, desc="sweep", unit="choice", disable=None):
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(options)
        quotas, found = _largest(tried, target)
        yield options | quotas, found


def _largest(config, target: Target) -> tuple[dict, StepPlan | None]:
    """Memory grows in proportion to the batch, so two batches foretell the largest; it is tried."""
    labelled, unlabelled = config.train.batch_labelled, config.train.batch_unlabelled
    common = math.gcd(labelled, unlabelled)
    unit = len(target.devices) * config.train.accumulate

    def quotas(times: int) -> dict:
        return {
            "train.batch_labelled": times * unit * labelled // common,
            "train.batch_unlabelled": times * unit * unlabelled // common,
        }

    def planned(times: int) -> StepPlan:
        config.update_from_flattened_dict(quotas(times))
        return plan_train(config, target)

    one = planned(1)
    if one.total > target.memory:
        return quotas(1), None
    two = planned(2)
    if two.total > target.memory:
        return quotas(1), one
    best, found = 2, two
    times = 2 + int((target.memory - two.total) / max(two.total - one.total, 1))
    while times > best:
        larger = planned(times)
        if larger.total <= target.memory:
            return quotas(times), larger
        # The excess tells how far back to go.
        slope = (larger.total - found.total) / (times - best)
        times -= max(1, math.ceil((larger.total - target.memory) / slope))
    return quotas(best), found


def sweep_line(options: dict, found: StepPlan | None) -> str:
    """One choice for people to read."""
    chunk = options["model.query_chunk"]
    queries = "all" if chunk == WHOLE else chunk
    batch = f"{options['train.batch_labelled']}+{options['train.batch_unlabelled']}"
    told = f"{options['model.dtype']:9} remat={options['model.remat']:7} queries={queries:<5}"
    if found is None:
        return f"{told} does not fit at {batch} slices"
    return (
        f"{told} {batch:>9} slices  {found.total / GIB:6.2f} GiB  {found.flops / 1e12:8.2f} TFLOP"
    )
