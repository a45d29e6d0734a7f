"""The command line as a user types it."""

import pathlib
import signal
import subprocess
import sys
import types

import nibabel as nib
import numpy as np
import pytest
from forked import run

from sammix_jax import main
from sammix_jax.config import default_config
from sammix_jax.data.files import read_json, write_json
from sammix_jax.systems.sam_mix import SamMixSystem

PROTOCOLS = SamMixSystem.protocols

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    "--config=configs/quickstart.py",
    "--config.data.size=64",
    "--config.model.image_size=64",
    "--config.data.phantom.scans=4",
    "--config.data.phantom.unlabelled=1",
    "--config.data.split=(1,1,1)",
    "--config.data.labelled_slices=5",
    "--config.train.steps=4",
    "--config.train.warmup_steps=1",
    "--config.train.batch_labelled=2",
    "--config.train.batch_unlabelled=2",
    "--config.log.validate_every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.evaluate.component=largest",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    command = [sys.executable, "-m", "sammix_jax.main", *SMALL, f"--workdir={folder}"]
    return folder, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_train_does_it_all(trained):
    folder, done = trained
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "scans.png", "split.json", "labels.json", "metrics.csv",
                 "evaluation/test/report.html", "prediction.nii.gz",
                 "prediction_overlay.png"):  # fmt: skip
        assert (folder / name).exists(), name
        if name.startswith(("evaluation", "prediction")):
            assert name in done.stdout
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert [word for word in first_words if word in PROTOCOLS] == [*PROTOCOLS] * 2  # two tables


def test_training_alone(tmp_path):
    """Of no part that could be scored; a small U-Net is compiled in a moment."""
    split = ["--config.data.split=(1,0,0)"]
    small = [option for option in SMALL if "data.split" not in option][1:]
    command = ["--config=configs/baselines/unet.py", *small, *split, "--config.train.steps=1",
               "--config.model.widths=(4,4,4)", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    refused = run(*command)
    assert refused.returncode == 1 and "Or train alone, with --noevaluate." in refused.stderr
    done = run(*command, "--noevaluate")
    assert done.returncode == 0, done.stderr
    assert "trained " in done.stdout and list((tmp_path / "run").glob("checkpoints/latest/1"))
    assert not (tmp_path / "run" / "evaluation").exists()


def test_run_again_says_that_it_is_done(trained):
    folder, _ = trained
    before = (folder / "evaluation" / "test" / "report.html").stat().st_mtime_ns
    again = run(*SMALL, f"--workdir={folder}")
    assert again.returncode == 0, again.stderr
    assert "is trained and evaluated" in again.stdout and "gt_box" in again.stdout
    assert "report.html" in again.stdout and "prediction.nii.gz" in again.stdout
    assert (folder / "evaluation" / "test" / "report.html").stat().st_mtime_ns == before


def test_what_an_earlier_checkpoint_made_is_made_anew(trained):
    folder, _ = trained
    results, prediction = folder / "evaluation" / "test" / "results.json", "prediction.nii.gz"
    found = read_json(results)
    write_json(results, found | {"checkpoint_step": found["checkpoint_step"] - 1})
    before = (folder / prediction).stat().st_mtime_ns
    again = run(*SMALL, f"--workdir={folder}")
    assert again.returncode == 0, again.stderr
    assert "is trained and evaluated" not in again.stdout
    assert read_json(results)["checkpoint_step"] == found["checkpoint_step"]
    assert (folder / prediction).stat().st_mtime_ns > before
    assert nib.load(folder / prediction).shape


def test_the_example_is_a_scan_that_trained_nothing(tmp_path):
    records = {
        name: types.SimpleNamespace(has_label=name != "bare")
        for name in ("trained", "chose", "unseen", "bare")
    }
    store = types.SimpleNamespace(records=records)
    config = default_config()

    def example(test):
        split = {"train": ["trained"], "val": ["chose"], "test": test}
        write_json(tmp_path / "split.json", split)
        return main._example_scan(config, store, tmp_path)

    assert example(["unseen"]) == "bare"
    config.consistency.weight = 0.1  # a teacher taught on it
    assert example(["unseen"]) == "unseen"
    assert example([]) == "chose"
    config.consistency.weight, config.data.patient = 0.0, "^[uc]|a"  # bare is trained's patient
    assert example(["unseen"]) == "unseen"


def test_evaluate_and_predict_need_no_config(trained, tmp_path):
    folder, _ = trained
    evaluated = run("--mode=evaluate", f"--workdir={folder}")
    assert evaluated.returncode == 0 and "gt_box" in evaluated.stdout, evaluated.stderr
    part = run("--mode=evaluate", f"--workdir={folder}", "--config.evaluate.part=val",
               "--config.evaluate.protocols=('cam',)")  # fmt: skip
    assert part.returncode == 0 and "gt_box" not in part.stdout, part.stderr
    other = run("--mode=evaluate", f"--workdir={folder}", "--config.input.window=(0.,100.)")
    assert other.returncode == 1 and "made with input.window=[-160.0, 240.0]" in other.stderr
    (scan,) = folder.glob("phantom-*/volume-0.nii.gz")
    made = run("--mode=predict", f"--workdir={folder}", f"--input={scan}",
               f"--output={tmp_path / 'mask.nii.gz'}")  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert " mL" in made.stdout
    assert nib.load(tmp_path / "mask.nii.gz").shape == nib.load(scan).shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.learning_rat=1"], "learning_rat"),
        (["--config.nothing.at_all=1"], "nothing"),
        (["--config.train.schedule=step"], "train.schedule='step': expected one of"),
        (["--mode=evaluate", "--config.data.root=elsewhere"], "--config.evaluate.root"),
        (["--config.input.window=(0.,100.)"], "input.window"),
        (["--config.data.split=(2,1,1)"], "--config.data.split: given 2 times"),
        (["--mode=predict"], "--input"),
        (["leftover"], "leftover"),
    ],
)
def test_mistakes_are_named_without_a_traceback(trained, arguments, message):
    folder, _ = trained
    made = run(*SMALL, f"--workdir={folder}", *arguments)
    assert made.returncode != 0
    assert message in made.stderr
    assert "Traceback" not in made.stderr


SMALL_PLAN = [
    "--config=configs/baselines/unet.py",
    "--config.model.widths=(4,4,4)",
    "--config.data.size=32",
]
# Stand-ins for what takes minutes.
STUBBED = """
from absl import app
from sammix_jax import main, options
def sweep(config, target):
    print("swept", config.data.size, target.name)
    return []
main.sweep.sweep = sweep
main.pretrain = lambda config, workdir: f"{workdir}/of {config.pretrain.images} images"
app.run(main.main, flags_parser=options.parse)
"""


def test_plans_from_the_command_line():
    made = run("--mode=plan", *SMALL_PLAN)
    assert made.returncode == 0, made.stderr
    assert "train step of 16 slices" in made.stdout and made.stdout.count("fits") == 2
    named = run("--mode=plan", *SMALL_PLAN, "--topology=v9:2x2")
    assert named.returncode == 1 and "--topology=v9:2x2: expected cpu" in named.stderr


def test_the_sweep_and_pretraining_from_the_command_line(tmp_path):
    def stubbed(*arguments):
        command = [sys.executable, "-c", STUBBED, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "swept 32 cpu" in stubbed("--mode=plan", "--sweep", "--topology=cpu", *SMALL_PLAN)
    told = stubbed("--mode=pretrain", "--config=configs/pretrain_mini.py", f"--workdir={tmp_path}")
    assert told == f"weights     {tmp_path}/of 8 images\n"


FULL = """
import errno, jax
from absl import app
from sammix_jax import main, options
def run(*_):
    raise {}
main._run = run
app.run(main.main, flags_parser=options.parse)
"""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            'OSError(errno.ENOSPC, "No space left on device", "a/file")',
            "No space left on device: 'a/file'; what was saved before is whole",
        ),
        (
            "ValueError(\"RESOURCE_EXHAUSTED: Error writing local file 'a/file': No space left on "
            "device [os_error_code='28']\")",
            "No space left on device [os_error_code='28']; what was saved before is whole",
        ),
        (
            'jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")',
            "what was saved before is whole (DEADLINE_EXCEEDED: Barrier timed out.)",
        ),
        (
            'TimeoutError("Timed out while waiting for async_write_complete barrier.")',
            "what was saved before is whole (Timed out while waiting for",
        ),
        (
            'PermissionError(errno.EACCES, "Permission denied", "a/folder")',
            "Permission denied: 'a/folder'; you lack the right to use it (chmod,",
        ),
        (
            'jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory for 8 bytes.")',
            "Out of memory for 8 bytes. A smaller --config.evaluate.batch lessens",
        ),
    ],
    ids=["disk", "disk of TensorStore", "deadline", "timeout", "right", "memory"],
)
def test_a_lack_of_room_or_of_a_right_is_told(tmp_path, error, message):
    script = FULL.format(error)
    command = [sys.executable, "-c", script, "--mode=evaluate", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr


def test_ctrl_c_ends_as_a_shell_expects_it(tmp_path):
    script = FULL.format("KeyboardInterrupt")
    command = [sys.executable, "-c", script, "--mode=evaluate", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == "stopped; run the same command to go on.\n"


CROSS_DOMAIN = "--config=configs/totalsegmentator.py"


def test_a_config_of_the_evaluation_alone_takes_the_rest_from_the_workdir(trained, tmp_path):
    folder, _ = trained
    for mask in folder.glob("phantom-*/segmentation-*.nii.gz"):
        case = tmp_path / "cases" / mask.name.removesuffix(".nii.gz").replace("segmentation-", "s")
        (case / "segmentations").mkdir(parents=True)
        (case / "ct.nii.gz").symlink_to(mask.with_name(mask.name.replace("segmentation", "volume")))
        image = nib.load(mask)
        organ = (np.asarray(image.dataobj) > 0).astype(np.uint8)
        nib.save(nib.Nifti1Image(organ, image.affine), case / "segmentations" / "liver.nii.gz")
    done = run("--mode=evaluate", CROSS_DOMAIN, f"--config.evaluate.root={tmp_path / 'cases'}",
               "--config.evaluate.scans=2", f"--workdir={folder}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert [word for word in words if word in PROTOCOLS] == [*PROTOCOLS] * 2  # two tables
    (results,) = folder.glob("evaluation/cases-*/results.json")
    settings = read_json(results)["evaluate"]
    assert (settings["scans"], settings["component"]) == (2, "largest")


def test_a_config_of_the_evaluation_alone_makes_no_run(tmp_path):
    for mode in ("train", "prepare"):
        made = run(f"--mode={mode}", CROSS_DOMAIN, f"--workdir={tmp_path}")
        assert made.returncode == 1 and "Traceback" not in made.stderr
        assert "totalsegmentator.py: says nothing of cam, checkpoint" in made.stderr
        assert "--mode=evaluate" in made.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.model = {'image_size': 128}", "made with model.image_size=64 (now 128)"),
        ("config.evaluate.scens = 3", "scens"),
        ("config.data = {'size': 'large'}", "large"),
    ],
)
def test_a_config_that_says_more_must_agree_with_the_workdir(trained, tmp_path, line, message):
    folder, _ = trained
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import totalsegmentator\n\ndef get_config():\n"
        f"    config = totalsegmentator.get_config().unlock()\n    {line}\n    return config\n"
    )
    made = run("--mode=evaluate", f"--config={path}", f"--workdir={folder}")
    assert made.returncode == 1 and message in made.stderr, made.stderr
    assert "Traceback" not in made.stderr


def test_bad_scan_is_named(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), tmp_path / "volume-0.nii")
    made = run("--mode=prepare", "--config=configs/lits.py", f"--config.data.root={tmp_path}",
               f"--workdir={tmp_path / 'run'}")  # fmt: skip
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1].startswith("error: ")
    assert "volume-0.nii: every voxel is 0" in made.stderr


def test_mistakes_in_naming_the_config(trained):
    folder, _ = trained
    made = run("--config=configs/nowhere.py", f"--workdir={folder}")
    assert made.returncode == 1 and "configs/nowhere.py: no such file" in made.stderr
    for options in (["--config=nowhere.py"], ["--config", "nowhere.py"]):
        made = run(*options, "--config.seed=1", f"--workdir={folder}")
        assert made.returncode == 1 and "--config=nowhere.py: no such file" in made.stderr
        assert "Traceback" not in made.stderr
    for more in ([], ["--config.train.steps=4"], ["--mode=evaluate"]):
        preset = run("--config=configs/lits.py:papr", f"--workdir={folder}", *more)
        assert preset.returncode == 1 and "Traceback" not in preset.stderr
        assert "no preset 'papr': expected one of paper, standard" in preset.stderr
    made = run("--mode=evaluate", f"--workdir={folder}", "--config.evaluate.gat=False")
    assert made.returncode == 1 and 'Did you mean "gate"' in made.stderr
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("config.train.steps = 7", "get_config() returned no config; end it with `return config`"),
        ("return 5", "get_config() returned no config; end it with `return config`"),
        ('config.train.steps = "40"; return config', "config.py, line 4: TypeError: Could not"),
        ('raise ValueError("two\\nlines")', "config.py, line 4: ValueError: two lines\n"),
        ("config.train.stepz = 40; return config", "{}, line 4: Key "),
        ("config.train.stepz = 40; return config", 'Did you mean "steps" instead of "stepz"?'),
        ("raise KeyError", "--config: {}, line 4: "),
        ("None.foo", "--config: {}, line 4: 'NoneType' object has no attribute 'foo'\n"),
    ],
)
def test_a_slip_in_a_config_of_ones_own(tmp_path, body, told):
    path = tmp_path / "config.py"
    path.write_text(
        "from configs import quickstart\ndef get_config():\n"
        f"    config = quickstart.get_config()\n    {body}\n"
    )
    done = run(f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert told.format(path) in done.stderr and "Other fields" not in done.stderr


def test_a_mistake_does_not_bind_the_workdir(tmp_path):
    """What the message says to do can be done in the same workdir."""
    wrong = run(*SMALL, f"--workdir={tmp_path}", "--config.data.labelled_slices=5000")
    assert wrong.returncode == 1 and "ask for fewer" in wrong.stderr
    assert not (tmp_path / "config.json").exists()
