"""The options of the command line, and the config that they make."""

import collections
import pathlib
import re
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from sammix_jax.config import default_config
from sammix_jax.config_files import load_config, overlay
from sammix_jax.config_rules import check_config
from sammix_jax.data.paths import Path, find_matching
from sammix_jax.data.scan_files import natural
from sammix_jax.errors import UserError

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
    about = (
        "The run's config, such as configs/lits.py; evaluate and predict take the workdir's "
        "without it. Every field is an option, --config.SECTION.FIELD=VALUE; sammix_jax/config.py "
        "lists them."
    )
    try:
        return config_flags.DEFINE_config_file("config", str(default), about)
    except (AttributeError, KeyError) as error:
        sys.exit(fail(_no_such_field(error)))
    except UserError as error:
        sys.exit(fail(str(error)))


def _no_such_field(error: Exception) -> str:
    """ml_collections wraps the KeyError that says what was meant in an AttributeError."""
    cause = error.args[0] if error.args else error
    told = cause.args[0] if isinstance(cause, KeyError) and cause.args else cause
    text = " ".join(str(told).split())
    if "has no attribute 'get_config'" in text:
        return "--config: the file has no get_config(), which returns the config, as in configs/."
    # Of all fields there are, the one that was meant is enough.
    text = re.sub(r' Other fields present: ".*"(?= Did you mean)', "", text)
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if where := _line_of_the_config(frames):
        return f"--config: {where}: {text}"
    return f"--config: no such field: {text}"


def _not_parsed(error: flags.Error) -> str:
    """Of what went wrong in a config file, ml_collections gives the whole traceback as text."""
    given, _, trace = str(error).partition(" Error whilst parsing config file")
    # Frames are indented, and what was raised comes after them.
    parts = re.match(r"\n?((?: .*\n)+)((?s:.*))", trace.rpartition("call last):")[2])
    if not parts:
        return f"{error} (--help tells of the flags)"
    frames, told = parts.groups()
    found = re.findall(r'File "(.+)", line (\d+)', frames)
    return f"{given.removeprefix('flag ')} {_line_of_the_config(found)}: {' '.join(told.split())}"


def _line_of_the_config(frames: list[tuple[str, int | str]]) -> str:
    """Where in the config file it happened, by the files and lines of a traceback: the file comes
    after the library that reads it. "" where it did not happen there."""
    last = max((i for i, (f, _) in enumerate(frames) if f.endswith("config_flags.py")), default=-1)
    after = [frame for frame in frames[last + 1 :] if not frame[0].startswith("<")]
    if last < 0 or not after or "ml_collections" in after[0][0]:
        return ""
    file, line = [frame for frame in after if frame[0] == after[0][0]][-1]
    return f"{file}, line {line}"


def fail(message: str) -> int:
    """Tells what is wrong; the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 1


CONFIG = _define_config()
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; summarise: several, by a pattern or with commas between; plan needs none.",
)
MODE = flags.DEFINE_enum(
    "mode", "train", list(MODES), "; ".join(f"{name}: {what}" for name, what in MODES.items())
)
MULTIHOST = flags.DEFINE_bool(
    "multihost",
    None,
    "Whether this is one of several processes of a run; left out, the environment tells.",
)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "plan: cpu, gpu, tpu, or a slice such as v5e:2x4; left out, the devices at hand.",
)
SWEEP = flags.DEFINE_bool(
    "sweep", False, "plan: find the largest batch that fits, by compute type, remat and attention."
)
EVALUATE = flags.DEFINE_bool(
    "evaluate", True, "train: score the model and segment a scan once it is trained."
)
INPUT = flags.DEFINE_string("input", None, "predict: a NIfTI scan, or a folder of them.")
SKIP_EXISTING = flags.DEFINE_bool(
    "skip_existing", False, "predict: leave out the scans whose masks are there already."
)
OUTPUT = flags.DEFINE_string(
    "output", None, "predict: the mask's file, or a folder. summarise: a folder for the means."
)


def parse(argv):
    """`app.run`'s parser: names a misspelt field or preset, or a missing config file, without a
    traceback."""
    given = collections.Counter(
        arg.partition("=")[0] for arg in argv if arg.startswith("--config.")
    )
    try:
        parsed = flags.FLAGS(argv)
        fields = config_flags.get_override_values(flags.FLAGS["config"])
        for option, times in given.items():
            # Absl would join the two, where of other values the last one counts.
            if times > 1 and isinstance(fields.get(option.removeprefix("--config.")), tuple):
                raise UserError(f"{option}: given {times} times, expected one value.")
        return parsed
    except (AttributeError, KeyError) as error:
        sys.exit(fail(_no_such_field(error)))
    except UserError as error:
        sys.exit(fail(str(error)))
    except flags.Error as error:
        sys.exit(fail(_not_parsed(error)))
    except OSError as error:  # before absl knows the flag's value
        given = " ".join(argv).partition("--config")[2].lstrip("= ").partition(" ")[0]
        sys.exit(fail(_not_loaded(given, error)))


def config_for(mode: str, workdir: Path | None):
    """The config of the command line, checked; what it leaves out, a trained workdir's own tells.

    Raises:
      UserError: a mode without the config that it needs, or one that cannot be.
    """
    config = _config_for(mode, workdir)
    check_config(config)
    return config


def _config_for(mode: str, workdir: Path | None):
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
            "--mode=evaluate --config.evaluate.root=DIR. Where its own were moved, give the new "
            "data.root once to the command that trained it, with --mode=prepare."
        )
    config = load_config(workdir)
    if not flag.present:
        config.update_from_flattened_dict(overrides)
        return config
    try:
        overlay(config, _named_config())
    except (KeyError, TypeError) as error:
        file = config_flags.get_config_filename(flag)
        raise UserError(f"--config={file}: does not fit the workdir's: {error}.") from error
    return config


def _named_config():
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    try:
        config = CONFIG.value
        config.lock()
        return config
    except (flags.IllegalFlagValueError, AttributeError) as error:  # of a None, of a number
        raise UserError(
            f"--config={file}: get_config() returned no config; end it with `return config`."
        ) from error
    except OSError as error:  # a file that could not be loaded is told at its first use
        raise UserError(_not_loaded(file, error)) from error


def _not_loaded(given: str, error: OSError) -> str:
    there = pathlib.Path(given.partition(":")[0]).exists()
    why = f"cannot be loaded ({error})" if there else "no such file"
    return f"--config={given}: {why}; there are some in configs/."


def workdirs(patterns: str) -> list[Path]:
    """Workdirs by patterns with commas between, each once, in natural order."""
    found = set()
    for pattern in patterns.split(","):
        folders = [path for path in find_matching(pattern.strip()) if path.is_dir()]
        if not folders:
            raise UserError(f"--workdir={pattern}: no such folder; give trained workdirs.")
        found |= set(folders)
    return sorted(found, key=lambda folder: natural(str(folder)))
