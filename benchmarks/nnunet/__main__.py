"""Command line: python -m benchmarks.nnunet {export,run,score} --output=DIR."""

from __future__ import annotations

import argparse
import logging
import pathlib
import runpy
import sys

from benchmarks import nnunet
from benchmarks.nnunet.commands import commands, execute, script
from benchmarks.nnunet.export import export
from benchmarks.nnunet.score import PROTOCOL, score
from sammix_jax.config_files import load_config
from sammix_jax.config_rules import check_config
from sammix_jax.errors import UserError
from sammix_jax.evaluation.tables import text


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("benchmarks").setLevel(logging.INFO)
    logging.getLogger("sammix_jax").setLevel(logging.INFO)
    try:
        args.do(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _export(args) -> None:
    config = _config(args.config) if args.config else load_config(args.workdir)
    if args.scans is not None:
        config.evaluate.scans = args.scans
    export(
        config,
        args.workdir,
        args.output,
        dataset_id=args.dataset_id,
        negatives=args.negatives,
        roots=args.roots,
    )


def _config(named: str):
    """The config of FILE.py or FILE.py:VARIANT."""
    file, has_variant, variant = named.partition(".py:")
    try:
        get_config = runpy.run_path(file + ".py" if has_variant else file)["get_config"]
    except (OSError, KeyError) as error:
        raise UserError(
            f"--config={named}: cannot be read as a config ({error!r}); give FILE.py or "
            "FILE.py:VARIANT, as to --mode=prepare."
        ) from error
    config = get_config(variant) if has_variant else get_config()
    check_config(config)
    return config


def _run(args) -> None:
    lines = commands(args.output, args.folds, args.trainer, args.device, args.processes)
    print(script(args.output, lines), flush=True)
    if args.execute:
        execute(args.output, lines)


def _score(args) -> None:
    for evaluation in score(args.output):
        summary, where = evaluation.summary[PROTOCOL], evaluation.results["evaluate"]
        print(
            f"{where['root'] or where['part']}, {PROTOCOL}: "
            f"Dice {text(summary, 'dice', interval=True)}, NSD {text(summary, 'nsd')}, "
            f"HD95 {text(summary, 'hd95_mm')} mm, slice Dice {text(summary, 'slice_dice')}, "
            f"{summary['scored']} scored, {summary['failures']} failures"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.nnunet", description=nnunet.__doc__.splitlines()[0]
    )
    verbs = parser.add_subparsers(required=True)

    verb = verbs.add_parser("export", help="write nnU-Net's raw layout")
    verb.set_defaults(do=_export)
    verb.add_argument("--workdir", required=True, help="trained, or prepared with --config")
    verb.add_argument("--config", help="FILE.py or FILE.py:VARIANT, of a workdir prepared alone")
    verb.add_argument("--dataset-id", type=int, default=501)
    verb.add_argument(
        "--negatives",
        type=int,
        help="training slices without the organ, as empty masks; default: as many as labelled ones",
    )
    verb.add_argument(
        "--roots", nargs="*", default=[], help="other folders of labelled scans to score"
    )
    verb.add_argument("--scans", type=int, help="how many of each are drawn: evaluate.scans")

    verb = verbs.add_parser("run", help="print nnU-Net's commands")
    verb.set_defaults(do=_run)
    verb.add_argument("--execute", action="store_true", help="run them too; needs nnunetv2")
    verb.add_argument(
        "--folds", nargs="+", default=["all"], help="all: one model of every mask; or fold numbers"
    )
    verb.add_argument("--trainer", default="nnUNetTrainer", help="such as nnUNetTrainer_50epochs")
    verb.add_argument("--device", default="cuda", choices=("cuda", "cpu", "mps"))
    verb.add_argument("--processes", type=int, default=0, help="0 takes nnU-Net's")

    verb = verbs.add_parser("score", help="score nnU-Net's predictions")
    verb.set_defaults(do=_score)
    for verb in verbs.choices.values():
        verb.add_argument("--output", type=pathlib.Path, required=True, help="the export's folder")
    return parser


if __name__ == "__main__":
    sys.exit(main())
