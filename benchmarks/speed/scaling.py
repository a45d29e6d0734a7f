"""Memory of the train step by SAM, size and chip, from programs compiled ahead of time.

    JAX_PLATFORMS=cpu python -m benchmarks.speed.scaling --topologies v5e:2x4 --sides 1024

One labelled and one other slice on each chip, `configs/lits.py:standard` with bfloat16 and blocks
recomputed. No TPU is needed, but its compiler: requirements/tpu.txt, in an environment of its own.
Prints a table row as each program is done; a row takes minutes.
"""

import argparse
import time

from configs import lits
from sammix_jax.plan import GIB, StepPlan, Target, find_target, plan_train

HEADER = """\
| SAM | side | slice | parameters | optimiser | activations | total | of the chip | TFLOP a slice \
| collectives | compiled in |
|---|---|---|---|---|---|---|---|---|---|---|"""


def config_of(sam: str, side: int, devices: int, remat: str):
    config = lits.get_config("standard")
    config.model.sam, config.model.image_size = sam, side
    config.model.dtype, config.model.remat = "bfloat16", remat
    config.train.batch_labelled = config.train.batch_unlabelled = devices
    return config


def row(sam: str, side: int, target: Target, found: StepPlan, seconds: float) -> str:
    parts = found.parts
    parameters = parts["trained parameters"] + parts["frozen parameters"]
    sizes = (parameters, parts["optimiser"], parts["activations"], found.total)
    cells = [sam, str(side), target.name, *(f"{size / GIB:.2f}" for size in sizes)]
    cells += [f"{found.total / target.memory:.0%}", f"{found.flops / found.slices / 1e12:.2f}"]
    cells += [", ".join(f"{n} {kind}" for kind, n in found.collectives.items()), f"{seconds:.0f} s"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v6e:2x4", "v5p:2x2x1"])
    parser.add_argument("--sams", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 512, 1024])
    parser.add_argument("--remat", default="blocks")
    flags = parser.parse_args()
    print(HEADER, flush=True)
    for topology in flags.topologies:
        target = find_target(topology)
        for sam in flags.sams:
            for side in flags.sides:
                begin = time.monotonic()
                found = plan_train(config_of(sam, side, len(target.devices), flags.remat), target)
                print(row(sam, side, target, found, time.monotonic() - begin), flush=True)


if __name__ == "__main__":
    main()
