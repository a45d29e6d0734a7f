"""nnU-Net's own commands for an export, printed or run.

As in nnU-Net's documentation: documentation/how-to/plan-and-preprocess.md, train-models.md and
run-inference.md, with the environment of documentation/setting_up_paths.md (MIC-DKFZ/nnUNet).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.nnunet.layout import read_cases
from sammix_jax.errors import UserError

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


def environment(output: pathlib.Path) -> dict[str, str]:
    """The variables by which nnU-Net finds its folders."""
    return {name: str(output.resolve() / name) for name in VARIABLES}


def commands(
    output: pathlib.Path,
    folds: Sequence[str] = ("all",),
    trainer: str = "nnUNetTrainer",
    device: str = "cuda",
    processes: int = 0,
) -> list[list[str]]:
    """Plan and preprocess, train each fold, predict with all of them; each as its arguments.

    Args:
      output: an export.
      folds: `all` trains once on every mask, as SAM-Mix does; numbers are those of
        splits_final.json, whose models predict together.
      trainer: nnU-Net's trainer class, such as `nnUNetTrainer_50epochs`.
      device: `cuda`, `cpu` or `mps`.
      processes: worker processes of preprocessing and prediction; 0 takes nnU-Net's.

    Raises:
      UserError: no export there, or folds that it does not have.
    """
    layout, cases = read_cases(output)
    known = ["all", *(str(i) for i in range(cases["folds"]))]
    if unknown := [fold for fold in folds if fold not in known]:
        # nnU-Net would draw a split of its own, which parts the slices of a patient.
        raise UserError(
            f"folds={unknown}: {layout.splits} has {cases['folds']} folds, by patient; expected "
            f"some of {', '.join(known)}."
        )
    number = str(int(layout.dataset.removeprefix("Dataset")[:3]))
    images, masks = layout.raw.resolve() / "imagesTs", layout.predictions.resolve()
    model = ["-tr", trainer, "-device", device]
    plan = ["nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "--verify_dataset_integrity"]
    predict = ["nnUNetv2_predict", "-i", str(images), "-o", str(masks), "-d", number, "-c", "2d"]
    predict += ["-f", *folds, *model]
    if processes:
        plan += ["-npfp", str(processes), "-np", str(processes)]
        predict += ["-npp", str(processes), "-nps", str(processes)]
    train = [["nnUNetv2_train", number, "2d", fold, *model] for fold in folds]
    return [plan, *train, predict]


def script(output: pathlib.Path, lines: Sequence[Sequence[str]]) -> str:
    """The commands with their environment, as a shell takes them."""
    exports = [f"export {name}={shlex.quote(at)}" for name, at in environment(output).items()]
    return "\n".join([*exports, *map(shlex.join, lines)])


def execute(output: pathlib.Path, lines: Sequence[Sequence[str]]) -> None:
    """Runs the commands one after the other.

    Raises:
      UserError: nnU-Net is not installed here, or a command failed.
    """
    if importlib.util.find_spec("nnunetv2") is None:
        raise UserError(
            "nnunetv2 is not installed for this Python; install PyTorch for your device from "
            "https://pytorch.org, then `pip install nnunetv2`, or run the printed commands where "
            "it is installed."
        )
    # The commands lie beside the Python that has the package, whether or not that is on PATH.
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**os.environ, **environment(output), "PATH": path}
    for line in lines:
        try:
            code = subprocess.run(line, env=env).returncode
        except FileNotFoundError as error:
            raise UserError(f"{line[0]}: no such command; install nnunetv2 again.") from error
        if code:
            raise UserError(
                f"{shlex.join(line)}: ended with code {code}; what went wrong stands above."
            )
