"""slurm.sh against an srun and a scontrol that record how they are called."""

import shlex

import pytest
from script_fakes import OPTIONS, SCRIPTS, Fakes


@pytest.fixture
def fakes(tmp_path):
    return Fakes(tmp_path)


RUNNING = {"show job": [["JobId=42 JobName=sammix JobState=RUNNING Requeue=1", 0]]}


def slurm(fakes, code, answers=RUNNING, **environment):
    fakes.answer({"srun": [["", code]]} | answers)
    return fakes.run("slurm.sh", *OPTIONS, SLURM_JOB_ID="42", **environment)


def test_srun_runs_the_program(fakes):
    assert slurm(fakes, 0, PYTHON="/opt/python")[0] == 0
    program = ["/opt/python", "-m", "sammix_jax.main", *OPTIONS]
    assert fakes.calls() == [["srun", "--kill-on-bad-exit=0", "--cpus-per-task=8", *program]]


def test_srun_gives_a_task_the_jobs_cores(fakes):
    assert slurm(fakes, 0, SLURM_CPUS_PER_TASK="12")[0] == 0
    assert "--cpus-per-task=12" in fakes.calls()[0]


def test_a_job_stopped_after_a_save_is_requeued(fakes):
    assert slurm(fakes, 143)[0] == 143
    assert fakes.calls("requeue") == [["scontrol", "requeue", "42"]]


@pytest.mark.parametrize("code", [0, 1, 134, 137])
def test_other_ends_are_passed_on(fakes, code):
    assert slurm(fakes, code)[0] == code
    assert not fakes.calls("requeue")


def test_a_cancelled_job_is_not_requeued(fakes):
    cancelled = {"show job": [["JobId=42 JobState=CANCELLED Requeue=1", 0]]}
    assert slurm(fakes, 143, cancelled)[0] == 143
    assert not fakes.calls("requeue")


def test_a_dry_slurm_run_prints_srun(fakes):
    code, output, _ = slurm(fakes, 0, DRY_RUN="1")
    assert code == 0 and not fakes.calls()
    program = [".venv/bin/python", "-m", "sammix_jax.main", *OPTIONS]
    assert shlex.split(output)[-len(program) :] == program
    assert shlex.split(output)[0] == "srun"


def test_sbatch_options():
    lines = (SCRIPTS / "slurm.sh").read_text().split("\nset -euo")[0].splitlines()
    given = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")]
    options = dict(option.partition("=")[::2] for option in given)
    assert "requeue" in options and options["signal"] == "TERM@120"
    assert options["open-mode"] == "append"  # a requeued job does not wipe its log
    assert options["gres"] == f"gpu:{options['ntasks-per-node']}"  # one task a GPU
    assert "gpus-per-task" not in options
