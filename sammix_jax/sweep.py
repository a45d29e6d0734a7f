"""The largest batch that fits, under each choice that trades memory for time."""

import itertools
import logging
import math

from tqdm import tqdm

from sammix_jax.config_rules import check_config
from sammix_jax.errors import UserError
from sammix_jax.models.blocks import COMPUTE_DTYPES, POLICIES
from sammix_jax.plan import GIB, StepPlan, Target, plan_train
from sammix_jax.systems.named import HOLD_SAM

_LOG = logging.getLogger(__name__)

WHOLE = 2**20  # more queries than any grid has: attention is not cut in chunks


def sweep(config, target: Target):
    """Tries compute types, what is recomputed and how attention goes.

    Quotas grow together, in the config's proportion, in steps that all devices share.

    Yields:
      (options, plan): the fields that were set, with the largest batch; and its plan, None where
      not even the smallest batch fits. Choices that no run may have are left out.
    """
    remats, chunks = ("none",), (config.model.query_chunk,)
    if config.model.system in HOLD_SAM:  # the others know neither
        remats, chunks = POLICIES, (*chunks, WHOLE)
    choices = [
        {"model.dtype": dtype, "model.remat": remat, "model.query_chunk": chunk}
        for dtype, remat, chunk in itertools.product(COMPUTE_DTYPES, remats, chunks)
    ]
    for options in tqdm(choices, desc="sweep", unit="choice", disable=None):
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(options)
        try:
            check_config(tried)
        except UserError as error:
            _LOG.info("left out: %s", error)
            continue
        quotas, found = _largest(tried, target)
        yield options | quotas, found


def _largest(config, target: Target) -> tuple[dict, StepPlan | None]:
    """The largest that fits, beside one more that was tried and does not."""
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
        found = plan_train(config, target)
        # A choice takes several compilations, of minutes each.
        taken = f"{found.total / GIB:.2f} GiB" if math.isfinite(found.total) else "too much"
        _LOG.info("%d slices take %s of %.2f GiB", found.slices, taken, target.memory / GIB)
        return found

    low, high = {1: planned(1)}, {}
    if low[1].total > target.memory:
        return quotas(1), None
    times = 2
    while min(high, default=math.inf) > max(low) + 1:
        found = planned(times)
        (low if found.total <= target.memory else high)[times] = found
        times = _between(low, high, target.memory)
    best = max(low)
    return quotas(best), low[best]


def _between(low: dict[int, StepPlan], high: dict[int, StepPlan], memory: int) -> int:
    """The batch that memory foretells to be the largest, not tried yet: by the line through the
    two nearest that were, or halfway where the compiler gave no number."""
    if high and math.isinf(high[min(high)].total):
        return max(low) + max(1, (min(high) - max(low)) // 2)
    tried = sorted((low | high).items(), key=lambda one: abs(one[1].total - memory))
    (a, at_a), (b, at_b) = tried[:2]
    slope = (at_a.total - at_b.total) / (a - b)
    # Of two small batches the larger may take less, and then they foretell nothing.
    farthest = 8 * max(low)
    foretold = a + math.floor((memory - at_a.total) / slope) if slope > 0 else 2 * max(low)
    foretold = min(foretold, farthest)
    return max(max(low) + 1, min(foretold, min(high, default=math.inf) - 1))


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
