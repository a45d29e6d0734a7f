"""Command line of SAM-Mix.

python -m sammix_jax.main --config=configs/lits.py --config.data.root=DIR --workdir=DIR
python -m sammix_jax.main --mode=predict --workdir=DIR --input=scan.nii.gz --output=mask.nii.gz
python -m sammix_jax.main --mode=summarise --workdir='runs/seed-*'
"""

import collections
import errno
import logging
import os
import pathlib
import sys
import traceback

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

from sammix_jax import evaluate, hosts, plan, predict, prepare, sweep, train
from sammix_jax.compilation import cache_compilations
from sammix_jax.config import check_workdir, default_config, load_config
from sammix_jax.config_rules import check_config, check_weight_files
from sammix_jax.data.datasets import natural
from sammix_jax.data.paths import Path, as_path, find_matching
from sammix_jax.data.slices import SliceStore
from sammix_jax.data.split_files import kept_split
from sammix_jax.data.splits import patient_of
from sammix_jax.errors import UserError
from sammix_jax.evaluation import report, results, seeds
from sammix_jax.evaluation.tables import result_table
from sammix_jax.pretrain.run import pretrain
from sammix_jax.systems.named import make_system
from sammix_jax.systems.system import ORACLES

MODES = {
    "train": "prepare if needed, train, evaluate, predict one case",
    "prepare": "bring the scans into the slice store",
    "pretrain": "train a promptable SAM on procedural scenes and write its weights",
    "evaluate": "score the trained workdir",
    "predict": "segment --input into --output",
    "plan": "compile the steps of --config and tell what memory they take; needs no data",
    "summarise": "mean results of several evaluated workdirs that differ by their seeds",
}


def _define_config():
    """ml_collections applies `--config.field=value` to the default as soon as it is defined."""
    default = pathlib.Path(__file__).with_name("config.py")
    about = "The run's config; evaluate and predict take the workdir's without it."
    try:
        return config_flags.DEFINE_config_file("config", str(default), about)
    except (AttributeError, KeyError) as error:
        sys.exit(_fail(_no_such_field(error)))
    except UserError as error:
        sys.exit(_fail(str(error)))


def _no_such_field(error: Exception) -> str:
    """ml_collections wraps the KeyError that says what was meant in an AttributeError."""
    cause = error.args[0]
    text = cause.args[0] if isinstance(cause, KeyError) else cause
    return f"--config: no such field: {' '.join(str(text).split())}"


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


_CONFIG = _define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; summarise: several, by a pattern or with commas between; plan needs none.",
)
_MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES), "; ".join(f"{name}: {what}" for name, what in MODES.items())
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost",
    None,
    "Whether this is one of several processes of a run; left out, the environment tells.",
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "plan: cpu, gpu, tpu, or a slice such as v5e:2x4; left out, the devices at hand.",
)
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "plan: find the largest batch that fits, by compute type, remat and attention."
)
_INPUT = flags.DEFINE_string("input", None, "predict: a NIfTI scan, or a folder of them.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "predict: the mask's file, or a folder. summarise: a folder for the means."
)


# A disk or a quota that is full, or a folder that may only be read.
_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def main(argv) -> int:
    if len(argv) > 1:
        return _fail(f"unexpected arguments {argv[1:]}; every option begins with --")
    cache_compilations()
    hosts.let_sigterm_end()  # until there is something to save
    try:
        hosts.join(_MULTIHOST.value)
        if _MODE.value not in ("train", "pretrain"):  # of several processes JAX has its own handler
            hosts.let_sigterm_end()
        if not hosts.is_first():  # which alone speaks to the user, but for errors
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 — for the rest of the process
        _log_to_terminal()
        if _MODE.value == "plan":
            _plan()
        elif not _WORKDIR.value:
            raise UserError(f"--mode={_MODE.value} needs --workdir.")
        elif _MODE.value == "summarise":
            _summarise(_workdirs(_WORKDIR.value))
        else:
            _run(_MODE.value, as_path(_WORKDIR.value))
    except hosts.Terminated as stopped:
        print(f"{stopped}; run the same command to go on.", file=sys.stderr)
        return hosts.TERMINATED
    except UserError as error:
        return hosts.leave(_fail(str(error)))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_PLACE:
            told = f"{error}; what was saved before is whole: make room and run the same command."
            return hosts.leave(_fail(told))
        if jax.distributed.is_initialized():
            traceback.print_exc()
            hosts.leave(1)
        raise
    return 0


def _run(mode: str, workdir: Path) -> None:
    config = _config(mode, workdir)
    check_config(config)
    if mode == "prepare":
        _prepare(config, workdir)
        return
    other_scans = mode == "predict" or (mode == "evaluate" and bool(config.evaluate.root))
    check_workdir(config, workdir, other_scans)
    if mode == "pretrain":
        print(f"weights     {pretrain(config, workdir)}")
    elif mode == "train":
        if not (workdir / "config.json").exists():
            check_weight_files(config)
        _train(config, workdir)
    elif mode == "evaluate":
        _evaluate(config, workdir)
    else:
        if not _INPUT.value or not _OUTPUT.value:
            raise UserError("--mode=predict needs --input and --output.")
        for made in predict.predict(config, workdir, _INPUT.value, _OUTPUT.value):
            volume = "size unknown" if made.organ_ml is None else f"{made.organ_ml:.1f} mL"
            print(f"{made.mask}: {config.data.organ} {volume}, see {made.overlay}")


def _plan() -> None:
    config = _config("plan", None)
    check_config(config)
    target = plan.find_target(_TOPOLOGY.value or jax.default_backend())
    if not _SWEEP.value:
        print(plan.plan_table(plan.plan(config, target), target))
        return
    print(plan.target_line(target))
    for options, found in sweep.sweep(config, target):
        print(sweep.sweep_line(options, found), flush=True)


def _config(mode: str, workdir: Path | None):
    """The config of the command line; what it leaves out, a trained workdir's own tells."""
    flag = flags.FLAGS["config"]
    if mode in ("train", "prepare", "pretrain", "plan"):
        if not flag.present:
            raise UserError(f"--mode={mode} needs --config=configs/NAME.py.")
        config = _named_config()
        if lacking := sorted(set(default_config()) - set(config)):
            raise UserError(
                f"--config={config_flags.get_config_filename(flag)}: says nothing of "
                f"{', '.join(lacking)}, so it makes no run; give it to --mode=evaluate with the "
                "--workdir of one."
            )
        return config
    overrides = config_flags.get_override_values(flag)
    if "data.root" in overrides:
        raise UserError(
            f"--mode={mode} takes no data.root, it uses the workdir's scans; to score others give "
            "--mode=evaluate --config.evaluate.root=DIR."
        )
    config = load_config(workdir)
    if not flag.present:
        config.update_from_flattened_dict(overrides)
        return config
    try:
        config.update(_named_config())
    except (KeyError, TypeError) as error:
        file = config_flags.get_config_filename(flag)
        raise UserError(f"--config={file}: does not fit the workdir's: {error}.") from error
    return config


def _named_config():
    config = _CONFIG.value
    try:
        config.lock()
        return config
    except OSError as error:  # a file that could not be loaded is told at its first use
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        raise UserError(f"--config={file}: no such file; there are some in configs/.") from error


def _prepare(config, workdir: Path) -> SliceStore:
    """By the first process alone; the others open what it has made."""
    return hosts.first_then_others(
        lambda: prepare.prepare(config, workdir),
        lambda: SliceStore.open(prepare.store_folder(config, workdir)),
    )


def _train(config, workdir: Path) -> None:
    store = _prepare(config, workdir)
    trained = train.train(config, workdir, store)
    hosts.let_sigterm_end()
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
        predict.predict(config, workdir, _example_scan(config, store, workdir), prediction)
    print(f"overlay     {workdir / 'prediction_overlay.png'}\nprediction  {prediction}")


def _example_scan(config, store: SliceStore, workdir: Path) -> str:
    """A scan of a patient who trained nothing, where there is one: without a mask, unless a teacher
    taught on those, or of the test part; else one that only chose the checkpoint; else any."""
    split, pattern = kept_split(workdir), config.data.patient
    unlabelled = [name for name, record in store.records.items() if not record.has_label]
    trained = {patient_of(name, pattern) for name in split.train}
    if config.consistency.weight > 0:
        trained |= {patient_of(name, pattern) for name in unlabelled}
    unseen = [name for name in unlabelled if patient_of(name, pattern) not in trained]
    name = [*unseen, *split.test, *split.val, *store.records][0]
    return store.records[name].image


def _evaluate(config, workdir: Path) -> None:
    try:
        _report(config, workdir, evaluate.evaluate(config, workdir))
    except evaluate.IncompleteEvaluation as error:
        _report(config, workdir, error.evaluation)
        raise


def _report(config, workdir: Path, evaluation: evaluate.Evaluation) -> None:
    if not hosts.is_first():
        return
    report.write_report(results.results_folder(config, workdir), evaluation, config, workdir)
    print()
    _print_results(config, workdir, evaluation.results)


def _print_results(config, workdir: Path, found: dict) -> None:
    page = results.results_folder(config, workdir) / report.PAGE
    print(f"{result_table(found)}\n\nreport      {page}")


def _print_warnings(found: dict) -> None:
    for warning in results.seen_before(found):
        print(f"warning: {warning}")


def _workdirs(patterns: str) -> list[Path]:
    """Workdirs by patterns with commas between, each once, in natural order."""
    found = set()
    for pattern in patterns.split(","):
        folders = [path for path in find_matching(pattern.strip()) if path.is_dir()]
        if not folders:
            raise UserError(f"--workdir={pattern}: no such folder; give trained workdirs.")
        found |= set(folders)
    return sorted(found, key=lambda folder: natural(str(folder)))


def _summarise(workdirs: list[Path]) -> None:
    """The evaluation of each workdir that the config of the first one, or --config, names."""
    config = _config("summarise", workdirs[0])
    check_config(config)
    found = [results.load_results(config, workdir) for workdir in workdirs]
    means = seeds.over_seeds(found, [str(workdir) for workdir in workdirs])
    count, scans = len(means["runs"]), len(means["scans"])
    print(f"mean ± standard deviation over {count} runs, each its mean over {scans} scans\n")
    print(result_table(means))
    _print_warnings(means)
    if _OUTPUT.value:
        seeds.write_over_seeds(_OUTPUT.value, means)
        print(f"\nsummary     {as_path(_OUTPUT.value) / 'summary.json'}")


def _parse_flags(argv):
    """Names a misspelt field or preset, or a missing config file, without a traceback."""
    given = collections.Counter(
        arg.partition("=")[0] for arg in argv if arg.startswith("--config.")
    )
    try:
        parsed = app.parse_flags_with_usage(argv)
        fields = config_flags.get_override_values(flags.FLAGS["config"])
        for option, times in given.items():
            # Absl would join the two, where of other values the last one counts.
            if times > 1 and isinstance(fields.get(option.removeprefix("--config.")), tuple):
                raise UserError(f"{option}: given {times} times, expected one value.")
        return parsed
    except (AttributeError, KeyError) as error:
        sys.exit(_fail(_no_such_field(error)))
    except UserError as error:
        sys.exit(_fail(str(error)))
    except OSError:
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        sys.exit(_fail(f"--config={file}: cannot be loaded; there are some in configs/."))


def _log_to_terminal() -> None:
    """This project's messages only: Orbax tells of every file and folder that it opens."""
    absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler(sys.stderr)
    if not hosts.is_first():
        handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("sammix_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
