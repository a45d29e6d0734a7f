"""nnU-Net v2 as an outside peer: the same slices in, the same scores out.

    python -m benchmarks.nnunet export --workdir=runs/lits --output=runs/lits-nnunet
    python -m benchmarks.nnunet run --output=runs/lits-nnunet --execute
    python -m benchmarks.nnunet score --output=runs/lits-nnunet

`export` hands nnU-Net the masks that train SAM-Mix and no others, `run` prints or runs nnU-Net's
own commands, `score` scores its masks as this project scores its own. See docs/results.md.
"""
