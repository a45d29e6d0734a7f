"""Several processes write once, and stop together."""

import re
import signal

import pytest
from conftest import small_config
from processes import finish, start_several

from sammix_jax.config_files import claim_workdir
from sammix_jax.training.log import read_log

RUN = """
import os, signal, sys, time
import jax, numpy as np
from jax.sharding import PartitionSpec, NamedSharding
from sammix_jax import hosts
from sammix_jax.data.files import write_json
from sammix_jax.errors import UserError
from sammix_jax.sharding import BatchLayout, make_mesh, place_batch
hosts.join()
folder, me = sys.argv[1], jax.process_index()
def write(me):
    open(folder + "/log", "a").write(f"{me} ")
    return me
made = hosts.first_then_others(lambda: write(me), lambda: write(10 * me))
def fails(error):
    raise error
for error in (UserError("no scans"), OSError("no bucket")):
    try:
        hosts.first_then_others(lambda: fails(error), lambda: print("never"))
    except Exception as error:
        print("process", me, "is told:", error)
def read():
    return fails(OSError("one of two")) if me else 1
try:
    print("process", me, "found", hosts.for_all(read, "a scan"))
except OSError as error:
    print("process", me, "raises", error)
write_json(folder + "/one.json", me)
mesh, layout = make_mesh(), BatchLayout(4, 8, 4)
read = []
def batches(step, rows):
    read.extend(int(row) for row in rows)
    rows = np.asarray(rows)
    hu = np.repeat(rows, 4).reshape(-1, 2, 2).astype(np.int16)
    return {"hu": hu, "mask": hu[rows < 4].astype(np.uint8), "image_label": rows.astype(np.int32)}
batch = place_batch(batches, 0, layout, mesh)
whole = hosts.to_host(batch)
assert whole["image_label"].tolist() == layout.order.tolist(), whole
assert whole["mask"][:, 0, 0].tolist() == [0, 1, 2, 3]
with hosts.Termination(0) as termination:
    print("process", me, "made", made, "read", sorted(read), "stops", termination.asked(1))
    if me == 1:  # only one machine is told
        os.kill(os.getpid(), signal.SIGTERM)
    for step in range(2, 600):
        time.sleep(0.1)  # what a step takes
        if termination.asked(step):
            print("process", me, "was asked to stop after step", step)
            break
print("process", me, "alike", hosts.all_alike(["a scan"]), hosts.all_alike(["a scan", me]))
print("process", me, "bar", hosts.hides_progress())
hosts.wait_for_all("end")
"""


def test_two_processes_share_a_batch_and_write_once(tmp_path):
    """Each reads its own rows; the first writes, and the other finds it."""
    (tmp_path / "run.py").write_text(RUN)
    pair = start_several([tmp_path / "run.py", tmp_path], 2, devices=2)
    output = "".join(finish(process) for process in pair)
    # Four shards with one labelled slice and two others each; two shards a process.
    assert "process 0 made 0 read [0, 1, 4, 5, 6, 7] stops False" in output
    assert "process 1 made 10 read [2, 3, 8, 9, 10, 11] stops False" in output
    # A SIGTERM to one of them stops both, after one and the same step.
    stopped = dict(re.findall(r"process (\d) was asked to stop after step (\d+)", output))
    assert stopped.keys() == {"0", "1"} and stopped["0"] == stopped["1"], output
    assert "process 0 alike True False" in output and "process 1 alike True False" in output
    assert "process 0 bar None" in output and "process 1 bar True" in output
    assert "process 0 is told: no scans" in output and "process 0 is told: no bucket" in output
    assert output.count("process 1 is told: the first process failed") == 2
    assert "never" not in output
    assert "process 0 found (None, 'a scan: failed in another process" in output
    assert "process 1 raises one of two" in output
    assert (tmp_path / "log").read_text() == "0 10 "
    assert (tmp_path / "one.json").read_text() == "0"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


RESUMED = """
import os, signal, sys, time
import jax
from sammix_jax import hosts
hosts.join()
hosts.any_process(False)
me, when = jax.process_index(), sys.argv[1]
def told(moment):
    if moment == when:
        if me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)  # the notice travels
told("before")
with hosts.Termination(5000) as termination:
    told("within")
    for step in range(5001, 5600):
        if termination.asked(step):
            print("process", me, "was asked to stop after step", step, flush=True)
            break
        time.sleep(0.1)
hosts.wait_for_all("saved")
hosts.let_sigterm_end()
hosts.wait_for_all("end")
print("process", me, "evaluates", flush=True)
if me == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize("when", ["before", "within"])
def test_a_resumed_run_of_two_is_stopped_by_a_signal_before_its_first_step(tmp_path, when):
    (tmp_path / "run.py").write_text(RESUMED)
    pair = start_several([tmp_path / "run.py", when], 2, devices=1)
    other = pair[1].communicate(timeout=120)[0]
    pair[0].kill()  # it would wait for the other, to end together
    output = pair[0].communicate()[0]
    stopped = re.findall(r"was asked to stop after step (\d+)", output + other)
    assert len(stopped) == 2 and stopped[0] == stopped[1], output + other
    assert int(stopped[0]) < 5100
    # With no state left to save the signal ends the process at once.
    assert "process 1 evaluates" in other and pair[1].returncode == -signal.SIGTERM


JOINED = """
import os, signal, sys, time
from absl import app
from sammix_jax import main, options
def signalled(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
main._run = signalled
app.run(main.main, flags_parser=options.parse)
"""


def test_a_run_of_one_that_jax_has_joined_ends_before_its_loop(tmp_path):
    """As on a TPU VM of one host, where JAX has a handler for several."""
    (process,) = start_several(["-c", JOINED, f"--workdir={tmp_path}"], 1, devices=1)
    finish(process, code=-signal.SIGTERM, seconds=50)


FAILING = """
import sys, time
from absl import app
from sammix_jax import evaluate, hosts, main, options
from sammix_jax.errors import UserError
def scored(config, workdir, report):
    hosts.any_process(False)
    print("scores", file=sys.stderr, flush=True)
    if sys.argv[0].endswith("fails.py") and hosts.is_first():
        raise UserError("the report could not be written")
    time.sleep(90)
main.evaluate.evaluate = scored
app.run(main.main, flags_parser=options.parse)
"""


@pytest.fixture
def two_that_score(tmp_path):
    """`start(name)`: two processes of `--mode=evaluate` with a stand-in for the scoring."""

    def start(name: str, script: str = FAILING):
        (tmp_path / name).write_text(script)
        (tmp_path / "run").mkdir()
        config = small_config()
        config.model.sam = "mini"  # the processes know of no other small one
        claim_workdir(config, tmp_path / "run")
        command = [tmp_path / name, "--mode=evaluate", f"--workdir={tmp_path / 'run'}"]
        return start_several(command, 2, devices=1)

    return start


def test_one_that_fails_takes_the_others_along(two_that_score):
    """At once, and with its own exit code: JAX would wait five minutes for them."""
    first, second = two_that_score("fails.py")
    told = finish(first, code=1, seconds=200)
    assert "error: the report could not be written" in told
    second.communicate(timeout=60)
    assert second.returncode != 0


REPORTING = """
import os, sys, time, types
from absl import app
from sammix_jax import evaluate, hosts, main, options
page = os.path.join(os.path.dirname(sys.argv[0]), "page")
def scored(config, workdir, report):
    found = types.SimpleNamespace(results={})
    report(found)
    raise evaluate.IncompleteEvaluation("1 of 2 scans could not be scored", found)
def write_report(*_):
    time.sleep(3)
    open(page, "w").close()
def leave(code, leave=hosts.leave):
    when = "with" if os.path.exists(page) else "before"
    print(f"leaves {when} the report", file=sys.stderr, flush=True)
    return leave(code)
main.evaluate.evaluate, main.report.write_report, hosts.leave = scored, write_report, leave
main._print_results = lambda *_: None
app.run(main.main, flags_parser=options.parse)
"""


def test_the_others_wait_for_the_report(tmp_path, two_that_score):
    pair = two_that_score("reports.py", REPORTING)
    for process in pair:
        told = process.communicate(timeout=200)[0]
        assert process.returncode == 1 and "leaves with the report" in told, told


def test_scoring_in_two_processes_ends_by_sigterm(two_that_score):
    """There is nothing to save, and JAX's handler would wait for a step."""
    pair = two_that_score("sleeps.py")
    for process in pair:
        while "scores" not in (line := process.stdout.readline()):
            assert line, process.wait()
    for process in reversed(pair):  # the first one's end would end the other
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGTERM


def test_the_whole_command_in_two_processes(tmp_path):
    """From scans to a report and a mask, written once; the second process has nothing to say."""
    fields = {
        "model.system": "unet",
        "model.widths": (4, 4, 4),
        "data.size": 64,
        "data.phantom.scans": 4,
        "data.phantom.unlabelled": 1,
        "data.split": (2, 1, 1),
        "data.labelled_slices": 8,
        "train.trainable": (".*",),
        "train.batch_labelled": 4,
        "train.batch_unlabelled": 4,
        "train.steps": 2,
        "log.every_steps": 1,
        "log.validate_every_steps": 2,
        "evaluate.protocols": ("none",),
        "mesh.fsdp": 2,
    }
    options = [f"--config.{field}={value}" for field, value in fields.items()]
    command = ["-m", "sammix_jax.main", "--config=configs/quickstart.py:random"]
    pair = start_several([*command, f"--workdir={tmp_path}", *options], 2, devices=2)
    first, second = (finish(process) for process in pair)
    assert "slice Dice" in first and "slice Dice" not in second
    rows = [row[:2] for row in read_log(tmp_path)]
    assert len(rows) == len(set(rows)) and {(1, "train/loss"), (2, "val/dice")} <= set(rows)
    folder = tmp_path / "evaluation" / "test"
    assert len((folder / "cases.csv").read_text().splitlines()) == 1 + 1  # one scan, one protocol
    assert (folder / "report.html").exists() and (tmp_path / "prediction.nii.gz").exists()
