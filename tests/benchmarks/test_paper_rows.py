"""The paper's comparison: which rows there are, what they differ in, and what the table says."""

import contextlib
import csv
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from matplotlib.image import imread

from benchmarks.accuracy import paper, paper_tuning
from benchmarks.accuracy.cells import Row, Score
from benchmarks.accuracy.paper_record import (
    DIGITS,
    METRICS,
    Record,
    read_records,
    records_of,
    write_records,
)
from benchmarks.accuracy.paper_tables import (
    NAMES,
    best_baseline,
    headline,
    markdown,
    paper_cells,
    plot_steps,
)
from benchmarks.accuracy.rows import DOMAINS
from configs import pretrain_mini
from configs.paper import BASELINE_STEPS, BASELINES, STEPS, SYSTEMS, get_config
from configs.quickstart import STARTS
from sammix_jax.config_rules import check_config
from sammix_jax.data.files import sha256
from sammix_jax.errors import UserError
from sammix_jax.systems.named import make_system
from sammix_jax.training.optim import split_params

STEPS_OF = {("unet", 50): 77, ("sam_pp", 50): 5, ("sam_mix", 50): 6}


@pytest.fixture
def row(tmp_path):
    """Makes the files of one row, with one Dice for each of two scans and protocols."""

    def make(system, dice, count=50, seed=0, domain=DOMAINS[0], protocols=None, curve=(0.2, 0.5)):
        workdir = tmp_path / f"{system}-k{count}-s{seed}"
        folder = workdir / "evaluation" / domain
        folder.mkdir(parents=True)
        digest = "0123456789ab" if system.startswith("sam") else ""
        (workdir / "weights.json").write_text(json.dumps({"model.sam_weights": digest}))
        log = [f"{100 * i + 100},val/dice,{value}" for i, value in enumerate(curve)]
        (workdir / "metrics.csv").write_text("\n".join(["step,metric,value", *log]))
        columns = ("scan", "protocol", "dice", "hd95_mm", "slice_dice", "slice_hausdorff_px")
        with open(folder / "cases.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for scan, value in zip("ab", dice, strict=True):
                for protocol in protocols or (headline(system),):
                    writer.writerow((scan, protocol, value, 12.34, round(value - 0.1, 3), 7))
        return Row(system, count, seed, domain, folder)

    return make


def recorded(rows, folder):
    """The records of rows, of the comparison's own configs."""
    return records_of(rows, lambda *key: paper.row_config(*key, folder))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_sound_named_and_stands_under_its_own_headline(system):
    config = get_config(system)
    check_config(config)
    assert make_system(config).headline == headline(system)
    assert headline(system) in config.evaluate.protocols
    assert system in NAMES


def test_all_rows_share_data_and_differ_in_system_labels_and_seed(tmp_path):
    configs = {system: paper.row_config(system, 5, 2, tmp_path) for system in SYSTEMS}
    # It has no use for any, and a run wants one.
    assert configs["sam_pp_0"].data.labelled_slices == 1
    configs["sam_pp_0"].data.labelled_slices = 5
    for config in configs.values():
        assert config.data.to_dict() == configs["unet"].data.to_dict()
        assert config.seed == config.data.labels_seed == 2
        assert config.data.labelled_slices == 5
        assert config.model.image_size == 2 * config.data.size == 256


def test_sam_mix_has_a_tenth_of_the_baselines_steps():
    assert BASELINE_STEPS == 10 * STEPS
    budgets = {system: get_config(system).train.steps for system in SYSTEMS}
    assert budgets.pop("sam_pp_0") == 0
    assert {s for s, steps in budgets.items() if steps == STEPS} == {
        s for s in SYSTEMS if headline(s) == "cam"
    }
    assert {s for s, steps in budgets.items() if steps == BASELINE_STEPS} == set(BASELINES)
    assert set(budgets.values()) == {STEPS, BASELINE_STEPS}


def test_who_starts_from_the_pretrained_sam():
    start = {system: get_config(system).model.sam_weights for system in SYSTEMS}
    sams = {"sam_pp_0", "sam_pp", "samed", "samed_lora"}
    sams |= {"labelled_only", "sam_mix_lora", "sam_mix", "sam_mix_teacher"}
    sams |= {"sam_mix_unprompted"}
    weights = STARTS["pretrained"]["model.sam_weights"]
    assert {system for system, file in start.items() if file == weights} == sams
    assert {start[system] for system in SYSTEMS if system not in sams} == {""}
    # Normalised as in pretraining.
    for system in sams:
        assert get_config(system).input.normalise == pretrain_mini.get_config().input.normalise


@pytest.mark.parametrize("system", ["sam_pp", "samed_lora", "sam_mix_lora"])
def test_a_pretrained_encoder_stays_frozen_but_for_lora(system):
    config = get_config(system)
    images = jnp.zeros((1, config.data.size, config.data.size))
    made = make_system(config)
    params = jax.eval_shape(lambda: made.init(jax.random.key(0), images))["params"]
    trained, frozen = split_params(params, config.train.trainable)
    encoder = {path for path in trained if path.startswith("sam/image_encoder/")}
    assert all("/lora_" in path for path in encoder)
    assert bool(encoder) == (system != "sam_pp")
    assert "sam/image_encoder/patch_embed/kernel" in frozen
    assert any(path.startswith("sam/mask_decoder/") for path in trained)


def test_rows_come_seed_by_seed_and_what_learns_nothing_comes_once():
    rows = list(paper.planned(list(SYSTEMS), [5, 50], [3, 4]))
    assert len(rows) == len(set(rows)) == (len(SYSTEMS) - 1) * 4 + 1
    trained = [row for row in rows if row[2] != "sam_pp_0"]
    assert [seed for seed, _, _ in trained] == sorted(seed for seed, _, _ in trained)
    assert [row for row in rows if row[2] == "sam_pp_0"] == [(0, 0, "sam_pp_0")]


def test_a_share_of_the_baselines_budget_leaves_as_many_validations_to_all(tmp_path):
    for system in set(SYSTEMS) - {"sam_pp_0"}:
        whole = paper.row_config(system, 50, 0, tmp_path)
        warmup = get_config(system).train.warmup_steps
        for share in (1.0, 0.1, 1e-4):
            config = paper.row_config(system, 50, 0, tmp_path, share)
            steps, every = config.train.steps, config.log.validate_every_steps
            if system not in BASELINES:
                assert config == whole
            elif share == 1e-4:
                assert steps == every == 1 and config.train.warmup_steps == min(1, warmup)
            else:
                assert steps == share * BASELINE_STEPS
                assert config.train.warmup_steps == share * warmup
            assert steps // every == (1 if steps == 1 else 10)
    assert paper.row_config("sam_pp_0", 50, 0, tmp_path, 0.1).train.steps == 0


def test_the_table_has_a_row_for_each_system_and_says_who_was_told_the_answer(row, tmp_path):
    rows = [
        row("unet", (0.6, 0.8)),
        row("unet", (0.5, 0.7), seed=1),
        row("unet", (0.3, 0.5), domain=DOMAINS[1]),
        row("unet", (0.3, 0.5), seed=1, domain=DOMAINS[1]),
        row("sam_pp", (0.9, 0.9)),
        row("sam_mix", (0.8, 0.9), protocols=("cam", "gt_box")),
    ]
    lines = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in markdown(paper_cells(recorded(rows, tmp_path)), STEPS_OF, DOMAINS).splitlines()
    ]
    head, _, unet, sam_pp, sam_mix = lines
    assert all(len(line) == len(head) == 13 for line in lines)
    assert unet[:5] == ["U-Net", "50", "77", "`none`", "2"]
    assert unet[5] == "0.650 ± 0.071" and unet[7] == "0.550 ± 0.071"
    assert unet[9] == "0.400 ± 0.000" and unet[6] == "12.3 ± 0.0"
    assert sam_pp[3] == "`gt_points`, oracle" and sam_pp[9] == "–"
    assert sam_mix[3] == "`cam`" and sam_mix[5] == "0.850"


def test_the_best_baseline_is_one_that_nobody_prompts(row, tmp_path):
    rows = [row("unet", (0.6, 0.8)), row("samed", (0.7, 0.8)), row("sam_pp", (0.9, 0.9))]
    rows.append(row("sam_mix", (0.9, 0.9), protocols=("cam", "none")))
    found = paper_cells(recorded(rows, tmp_path))
    assert best_baseline(found, DOMAINS[0], 50) == "samed"
    assert best_baseline(found, DOMAINS[0], 5) is None


def test_tables_and_figures_are_written_and_drawn(row, tmp_path):
    rows = [row("unet", (0.6, 0.8)), row("sam_mix", (0.8, 0.9), curve=(0.6, 0.8))]
    records = recorded(rows, tmp_path)
    assert paper.write_tables(records, tmp_path) == (tmp_path / "paper.md").read_text()
    with open(tmp_path / "paper.csv", encoding="utf-8", newline="") as file:
        assert {line["variant"] for line in csv.DictReader(file)} == {"unet", "sam_mix"}
    for name in ("paper.png", "steps.png"):
        assert imread(tmp_path / name).std() > 0.01
    plot_steps({"unet": [records["unet", 50, 0].curve]}, tmp_path / "one.png")
    assert (imread(tmp_path / "one.png") != imread(tmp_path / "steps.png")).any()


def test_records_outlive_their_workdirs(row, tmp_path):
    rows = [row("unet", (0.6, 0.8)), row("unet", (0.5, 0.7), domain=DOMAINS[1])]
    rows.append(row("sam_mix", (0.8, 0.9), protocols=("cam", "none"), curve=(0.25, 0.75)))
    records = recorded(rows, tmp_path)
    write_records(tmp_path, records)
    assert read_records(tmp_path) == records
    sam_mix = records["sam_mix", 50, 0]
    assert (sam_mix.steps, sam_mix.curve) == (STEPS, [(100, 0.25), (200, 0.75)])
    assert sam_mix.sam_weights == "01234567"
    assert records["unet", 50, 0].sam_weights == ""
    assert read_records(tmp_path / "nowhere") == {}


def test_a_row_of_another_budget_is_refused_before_it_is_trained(tmp_path, monkeypatch):
    values = dict.fromkeys(METRICS, 0.5)
    scores = [Score("unet", 5, 0, DOMAINS[0], "none", "volume-0", values)]
    write_records(tmp_path, {("unet", 5, 0): Record(600, "", scores)})
    ran = []
    monkeypatch.setattr(paper, "run_rows", lambda rows, *rest: ran.extend(rows))

    def run(*arguments):
        folders = ["--workdir", str(tmp_path / "runs"), "--record", str(tmp_path)]
        own = ["--systems", "unet", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["", *folders, *own, *arguments])
        with contextlib.suppress(FileNotFoundError):  # the table, which no row has written
            paper.main()

    with pytest.raises(SystemExit, match=r"unet, k=5: 3000 steps, .* has 600; .*--share"):
        run("--counts", "50", "5")
    assert not ran
    run("--counts", "50")  # another cell
    run("--counts", "5", "--share", "0.2")
    assert ran == [(1, 50, "unet"), (1, 5, "unet")]


def test_rows_that_do_not_go_together_are_not_kept(row, tmp_path, monkeypatch):
    rows = [row("unet", (0.6, 0.8)), row("unet", (0.5, 0.7), seed=1)]
    kept = recorded(rows[:1], tmp_path)
    kept["unet", 50, 0].steps = 5
    monkeypatch.setattr(paper, "check_budgets", lambda *_: None)
    monkeypatch.setattr(
        paper, "run_rows", lambda planned, config_of, folder, write: write(rows[1:])
    )
    folders = ["--workdir", str(tmp_path / "runs"), "--record", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["", *folders, "--systems", "unet"])
    write_records(tmp_path, kept)
    before = (tmp_path / "scores.csv").read_bytes()
    with pytest.raises(UserError, match="seed 0 has 5 steps"):
        paper.main()
    assert (tmp_path / "scores.csv").read_bytes() == before


@pytest.mark.parametrize("differs", [{"steps": 300}, {"sam_weights": "0123abcd"}])
def test_seeds_of_another_budget_or_start_are_refused(differs):
    records = {("unet", 5, 0): Record(3000, ""), ("unet", 50, 0): Record(300, "")}
    assert paper_cells(records) == {}
    records["unet", 5, 1] = Record(**({"steps": 3000, "sam_weights": ""} | differs))
    with pytest.raises(UserError, match=r"^unet, k=5: seed 0 has 3000 steps .* seed 1 has "):
        paper_cells(records)


def test_systems_that_began_from_different_weights_are_not_compared():
    records = {("unet", 5, 0): Record(300, ""), ("samed", 5, 0): Record(300, "0123abcd")}
    assert paper_cells(records) == {}
    records["sam_mix", 5, 0] = Record(300, "4567abcd")
    with pytest.raises(UserError, match=r"samed from 0123abcd, sam_mix from 4567abcd"):
        paper_cells(records)


def test_the_table_in_the_docs_is_that_of_its_record(tmp_path):
    """And its SAMs began from the weights that lie here."""
    docs = pathlib.Path(__file__).parents[2] / "docs"
    records = read_records(docs / "paper")
    assert records
    table = paper.write_tables(records, tmp_path)
    assert table == (docs / "paper" / "paper.md").read_text()
    assert table in (docs / "results.md").read_text()
    shipped = sha256(STARTS["pretrained"]["model.sam_weights"])[:DIGITS]
    assert {record.sam_weights for record in records.values()} == {"", shipped}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_the_readmes_table_is_a_part_of_it():
    root = pathlib.Path(__file__).parents[2]
    head, _, *rows = cells((root / "docs" / "paper" / "paper.md").read_text())
    portal, unenhanced = (head.index(f"{domain}: Dice") for domain in ("portal", "unenhanced"))
    dice = {(row[0], row[1], at): row[at] for row in rows for at in (portal, unenhanced)}
    named = {
        "the same, trained without its CAM's prompt": "SAM-Mix, trained without prompts",
        "the same, SAM from random weights": "SAM-Mix, SAM from random weights",
    }
    text = (root / "README.md").read_text()
    shown = cells(re.search(r"\n\| phantom \|.*?\n((?:\|.*\n)+)", text)[1])[1:]
    assert len(shown) > 5
    for name, *found in shown:
        wanted = [(k, at) for at in (portal, unenhanced) for k in ("5", "50")]
        assert found == [dice.get((named.get(name, name), *which), "–") for which in wanted], name


def test_no_such_system():
    with pytest.raises(UserError, match="no system 'unetr'"):
        get_config("unetr")


def test_tuning_takes_the_best_rate_and_then_turns_augmentation_round(tmp_path, monkeypatch):
    tried = []

    def score(system, rate, augment, folder, share):
        tried.append((rate, augment))
        return {3e-4: 0.5, 1e-3: 0.7, 3e-3: 0.6, 1e-2: 0.1}[rate]

    monkeypatch.setattr(paper_tuning, "score", score)
    paper_tuning.choose("unet", tmp_path, 0.1)
    usual = get_config("unet").train.augment
    assert tried == [*((rate, usual) for rate in paper_tuning.RATES), (1e-3, not usual)]


@pytest.mark.parametrize("system", paper_tuning.SYSTEMS)
def test_tuning_trains_sound_settings_and_tells_their_best_dice(
    system, tmp_path, monkeypatch, capsys
):
    def train(config, workdir, store):
        assert (config.train.learning_rate, config.train.augment) == (3e-3, False)
        assert config.seed == config.data.labels_seed == paper_tuning.SEED
        check_config(config)
        workdir.mkdir()
        (workdir / "metrics.csv").write_text(
            "step,metric,value\n30,val/dice,0.2\n60,val/dice,0.6\n90,val/dice,0.4\n"
        )

    monkeypatch.setattr(paper_tuning.train, "train", train)
    monkeypatch.setattr(paper_tuning.prepare, "prepare", lambda config, workdir: None)
    monkeypatch.setattr(paper_tuning, "make_portal", lambda config: None)
    assert paper_tuning.score(system, 3e-3, False, tmp_path, 0.1) == 0.6
    assert capsys.readouterr().out == f"| {system} | 300 | 0.003 | False | 0.600 |\n"
