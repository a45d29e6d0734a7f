"""Command line of SAM-Mix.

python -m sammix_jax.main --config=configs/lits.py --config.data.root=DIR --workdir=DIR
python -m sammix_jax.main --mode=predict --workdir=DIR --input=scan.nii.gz --output=mask.nii.gz
python -m sammix_jax.main --mode=summarise --workdir='runs/seed-*'
"""

import functools
import io
import logging
import os
import signal
import sys
import traceback

import absl.logging
import jax
from absl import app, flags

from sammix_jax import evaluate, hosts, options, plan, predict, prepare, sweep, train
from sammix_jax.compilation import cache_compilations
from sammix_jax.config_files import check_workdir
from sammix_jax.config_rules import check_files
from sammix_jax.data.paths import Path, as_path
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import kept_split
from sammix_jax.data.splits import patient_of
from sammix_jax.errors import UserError
from sammix_jax.evaluation import figures, report, results, seeds
from sammix_jax.evaluation.gallery import gallery
from sammix_jax.evaluation.tables import result_table
from sammix_jax.faults import fault_of_the_machine
from sammix_jax.pretrain.run import pretrain
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES

flags.adopt_module_key_flags(options)  # so that --help tells of them

# Whose same command takes up what was done before it was stopped.
_GOING_ON = ("train", "pretrain", "prepare", "evaluate")


def main(argv) -> int:
    if len(argv) > 1:
        return options.fail(f"unexpected arguments {argv[1:]}; every option begins with --")
    mode = options.MODE.value
    # JAX tells of each kind of accelerator that is not there; of one that is not used it warns.
    absl.logging.set_verbosity(absl.logging.WARNING)
    cache_compilations()
    hosts.let_sigterm_end()  # until there is something to save
    try:
        hosts.join(options.MULTIHOST.value)
        # JAX's own handler serves several processes that have something to save, and nobody else.
        if mode not in ("train", "pretrain") or jax.process_count() == 1:
            hosts.let_sigterm_end()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # for terminals that lack a letter
        if not hosts.is_first():  # which alone speaks to the user, but for errors
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 — for the rest of the process
        _log_to_terminal()
        if mode == "plan":
            _plan()
        elif not options.WORKDIR.value:
            raise UserError(f"--mode={mode} needs --workdir.")
        elif mode == "summarise":
            _summarise(options.workdirs(options.WORKDIR.value))
        else:
            _run(mode, as_path(options.WORKDIR.value))
    except hosts.Terminated as stopped:
        print(f"{stopped}; run the same command to go on.", file=sys.stderr)
        return hosts.TERMINATED
    except KeyboardInterrupt as stopped:
        goes_on = "; run the same command to go on" * (mode in _GOING_ON)
        print(f"{str(stopped) or 'stopped'}{goes_on}.", file=sys.stderr)
        if jax.distributed.is_initialized():
            return hosts.leave(128 + signal.SIGINT)
        # Python tidies up, then ends as Ctrl-C does, so that a shell ends its loop too.
        sys.excepthook = lambda *_: None
        raise
    except UserError as error:
        return hosts.leave(options.fail(str(error)))
    except Exception as error:
        if fault := fault_of_the_machine(error):
            return hosts.leave(options.fail(fault))
        if jax.distributed.is_initialized():
            traceback.print_exc()
            hosts.leave(1)
        raise
    return 0


def _run(mode: str, workdir: Path) -> None:
    if workdir.is_file():
        raise UserError(f"--workdir={workdir}: a file, expected a folder.")
    config = options.config_for(mode, workdir)
    if mode == "prepare":
        _prepare(config, workdir)
        return
    other_scans = mode == "predict" or (mode == "evaluate" and bool(config.evaluate.root))
    check_workdir(config, workdir, other_scans)
    if mode == "pretrain":
        print(f"weights     {pretrain(config, workdir)}")
    elif mode == "train":
        if not (workdir / "config.json").exists():
            check_files(config)
        _train(config, workdir)
    elif mode == "evaluate":
        _evaluate(config, workdir)
    else:
        if not options.INPUT.value or not options.OUTPUT.value:
            raise UserError("--mode=predict needs --input and --output.")
        places = (options.INPUT.value, options.OUTPUT.value, options.SKIP_EXISTING.value)
        for made in predict.predict(config, workdir, *places):
            print(f"{made.mask}: {config.data.organ} {made.size}, see {made.overlay}")


def _plan() -> None:
    config = options.config_for("plan", None)
    target = plan.find_target(options.TOPOLOGY.value or jax.default_backend())
    if not options.SWEEP.value:
        print(plan.plan_table(plan.plan(config, target), target))
        return
    print(plan.target_line(target))
    for choice, found in sweep.sweep(config, target):
        print(sweep.sweep_line(choice, found), flush=True)


def _prepare(config, workdir: Path) -> SliceStore:
    """By the first process alone; the others open what it has made."""
    store = hosts.first_then_others(
        lambda: prepare.prepare(config, workdir),
        lambda: SliceStore.open(prepare.store_folder(config, workdir)),
    )
    hosts.on_first(lambda: _show_scans(config, workdir, store))
    return store


def _show_scans(config, workdir: Path, store: SliceStore) -> None:
    picture = workdir / "scans.png"
    # Once the workdir is this run's, its scans stay the same.
    begun = (workdir / "config.json").exists() and picture.exists()
    if options.MODE.value == "prepare" or not begun:
        figures.save(gallery(store, config.input.window), picture)
        print(f"scans       {picture}: do the masks lie on the {config.data.organ}?")


def _train(config, workdir: Path) -> None:
    store = _prepare(config, workdir)
    trained = train.train(config, workdir, store, scored=options.EVALUATE.value)
    hosts.let_sigterm_end()
    if not options.EVALUATE.value:
        scorable = config.evaluate.root or kept_split(workdir).part(config.evaluate.part)
        scores = "--mode=evaluate scores it, " if scorable else ""
        print(f"trained     {workdir}; {scores}--mode=predict segments with it")
        return
    found = None if trained else results.saved_results(config, workdir)
    if found is None or not (results.results_folder(config, workdir) / report.PAGE).exists():
        _evaluate(config, workdir)
    else:
        print(f"\n{workdir} is trained and evaluated; its result:\n")
        _print_results(config, workdir, found)
        _print_warnings(found)
    if make_system(config).headline in ORACLES:
        return  # there is no segmenting without the truth
    prediction = workdir / "prediction.nii.gz"
    if found is None or not prediction.exists():
        scan = _example_scan(config, store, workdir)
        for made in predict.predict(config, workdir, store.records[scan].image, prediction):
            print(f"example     {scan}: {config.data.organ} {made.size}")
    print(f"overlay     {workdir / 'prediction_overlay.png'}\nprediction  {prediction}")


def _example_scan(config, store: SliceStore, workdir: Path) -> str:
    """The name of a scan of a patient who trained nothing, where there is one: without a mask,
    unless a teacher taught on those, or of the test part; else one that only chose the checkpoint;
    else any."""
    split, pattern = kept_split(workdir), config.data.patient
    unlabelled = [name for name, record in store.records.items() if not record.has_label]
    trained = {patient_of(name, pattern) for name in split.train}
    if config.consistency.weight > 0:
        trained |= {patient_of(name, pattern) for name in unlabelled}
    unseen = [name for name in unlabelled if patient_of(name, pattern) not in trained]
    return [*unseen, *split.test, *split.val, *store.records][0]


def _evaluate(config, workdir: Path) -> None:
    def write(evaluation: evaluate.Evaluation) -> None:
        report.write_report(results.results_folder(config, workdir), evaluation, config, workdir)
        print()
        _print_results(config, workdir, evaluation.results)

    # By the first process, for which the others wait: it would not outlive them.
    evaluate.evaluate(
        config, workdir, lambda evaluation: hosts.on_first(functools.partial(write, evaluation))
    )


def _print_results(config, workdir: Path, found: dict) -> None:
    page = results.results_folder(config, workdir) / report.PAGE
    print(f"{result_table(found)}\n\nreport      {page}")


def _print_warnings(found: dict) -> None:
    for warning in results.seen_before(found):
        print(f"warning: {warning}")


def _summarise(workdirs: list[Path]) -> None:
    """The evaluation of each workdir that the config of the first one, or --config, names."""
    config = options.config_for("summarise", workdirs[0])
    found = [results.load_results(config, workdir) for workdir in workdirs]
    means = seeds.over_seeds(found, [str(workdir) for workdir in workdirs])
    count, scans = len(means["runs"]), len(means["scans"])
    print(f"mean ± standard deviation over {count} runs, each its mean over {scans} scans\n")
    print(result_table(means))
    _print_warnings(means)
    if options.OUTPUT.value:
        seeds.write_over_seeds(options.OUTPUT.value, means)
        print(f"\nsummary     {as_path(options.OUTPUT.value) / 'summary.json'}")


def _log_to_terminal() -> None:
    """This project's messages only: Orbax tells of every file and folder that it opens, and at each
    one that cannot be read or written all that was under way. Its error says it too; but not where
    processes wait for one that cannot save."""
    alone = not jax.distributed.is_initialized()
    absl.logging.set_verbosity(absl.logging.FATAL if alone else absl.logging.ERROR)
    if alone:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler(sys.stderr)
    if not hosts.is_first():
        handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("sammix_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


if __name__ == "__main__":
    app.run(main, flags_parser=options.parse)
