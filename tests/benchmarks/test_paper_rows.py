"""The paper's comparison: which rows there are, what they differ in, and what the table says."""

import csv

import jax
import jax.numpy as jnp
import pytest
from matplotlib.image import imread

from benchmarks import paper, paper_tuning
from benchmarks.cells import Row
from benchmarks.paper_tables import (
    NAMES,
    best_baseline,
    headline,
    markdown,
    paper_cells,
    plot_steps,
)
from benchmarks.rows import DOMAINS
from configs import pretrain_mini
from configs.paper import BASELINE_STEPS, STEPS, SYSTEMS, get_config
from configs.quickstart import STARTS
from sammix_jax.config_rules import check_config
from sammix_jax.data.files import write_json
from sammix_jax.errors import UserError
from sammix_jax.optim import split_params
from sammix_jax.systems.named import make_system


@pytest.fixture
def row(tmp_path):
    """Makes the files of one row, with one Dice for each of two scans and protocols."""

    def make(system, dice, count=50, seed=0, domain=DOMAINS[0], protocols=None):
        folder = tmp_path / f"{system}-k{count}-s{seed}" / domain
        folder.mkdir(parents=True)
        columns = ("scan", "protocol", "dice", "hd95_mm", "slice_dice", "slice_hausdorff_px")
        with open(folder / "cases.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for scan, value in zip("ab", dice, strict=True):
                for protocol in protocols or (headline(system),):
                    writer.writerow((scan, protocol, value, 12.34, value - 0.1, 7))
        write_json(folder / "results.json", {"scans": ["a", "b"]})
        return Row(system, count, seed, domain, folder)

    return make


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
        assert config.model.image_size == 128


def test_sam_mix_has_a_tenth_of_the_baselines_steps():
    assert BASELINE_STEPS == 10 * STEPS
    budgets = {system: get_config(system).train.steps for system in SYSTEMS}
    assert {s for s, steps in budgets.items() if steps == STEPS} == {
        s for s in SYSTEMS if headline(s) == "cam"
    }
    assert budgets.pop("sam_pp_0") == 0
    assert set(budgets.values()) == {STEPS, BASELINE_STEPS}


def test_who_starts_from_the_pretrained_sam():
    start = {system: get_config(system).model.sam_weights for system in SYSTEMS}
    sams = {"sam_pp_0", "sam_pp", "samed", "labelled_only", "sam_mix"}
    weights = STARTS["pretrained"]["model.sam_weights"]
    assert {system for system, file in start.items() if file == weights} == sams
    assert {start[system] for system in SYSTEMS if system not in sams} == {""}
    # Normalised as in pretraining.
    for system in sams:
        assert get_config(system).input.normalise == pretrain_mini.get_config().input.normalise


@pytest.mark.parametrize("system", ["sam_pp", "samed", "labelled_only", "sam_mix"])
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


def test_a_share_of_the_budget_leaves_as_many_validations_to_all(tmp_path):
    for share in (1.0, 0.1, 1e-4):
        for system in SYSTEMS:
            config = paper.row_config(system, 50, 0, tmp_path, share)
            steps, every = config.train.steps, config.log.validate_every_steps
            if system == "sam_pp_0":
                assert steps == 0
            elif share == 1e-4:
                assert steps == every == 1
            else:
                assert steps // every == 10


def test_the_table_has_a_row_for_each_system_and_says_who_was_told_the_answer(row):
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
        for line in markdown(paper_cells(rows), DOMAINS).splitlines()
    ]
    head, _, unet, sam_pp, sam_mix = lines
    assert all(len(line) == len(head) == 12 for line in lines)
    assert unet[:4] == ["U-Net", "50", "`none`", "2"]
    assert unet[4] == "0.650 ± 0.071" and unet[6] == "0.550 ± 0.071"
    assert unet[8] == "0.400 ± 0.000" and unet[5] == "12.3 ± 0.0"
    assert sam_pp[2] == "`gt_points`, oracle" and sam_pp[8] == "–"
    assert sam_mix[2] == "`cam`" and sam_mix[4] == "0.850"


def test_the_best_baseline_is_one_that_nobody_prompts(row):
    rows = [row("unet", (0.6, 0.8)), row("samed", (0.7, 0.8)), row("sam_pp", (0.9, 0.9))]
    rows.append(row("sam_mix", (0.9, 0.9), protocols=("cam", "none")))
    found = paper_cells(rows)
    assert best_baseline(found, DOMAINS[0], 50) == "samed"
    assert best_baseline(found, DOMAINS[0], 5) is None


def test_tables_and_figures_are_written_and_drawn(row, tmp_path):
    rows = [row("unet", (0.6, 0.8)), row("sam_mix", (0.8, 0.9))]
    for system, curve in (("unet", (0.2, 0.5)), ("sam_mix", (0.6, 0.8))):
        lines = [f"{100 * i + 100},val/dice,{value}" for i, value in enumerate(curve)]
        text = "\n".join(["step,metric,value", *lines])
        (tmp_path / f"{system}-k50-s0" / "metrics.csv").write_text(text)
    assert paper.write_tables(rows, tmp_path) == (tmp_path / "paper.md").read_text()
    with open(tmp_path / "paper.csv", newline="") as file:
        assert {line["variant"] for line in csv.DictReader(file)} == {"unet", "sam_mix"}
    for name in ("paper.png", "steps.png"):
        assert imread(tmp_path / name).std() > 0.01
    plot_steps({"unet": [tmp_path / "unet-k50-s0"]}, tmp_path / "one.png")
    assert (imread(tmp_path / "one.png") != imread(tmp_path / "steps.png")).any()


def test_no_such_system():
    with pytest.raises(UserError, match="no system 'unetr'"):
        get_config("unetr")


def test_every_setting_of_a_grid_is_sound(tmp_path):
    for system in SYSTEMS:
        if system == "sam_pp_0":
            continue
        found = list(paper_tuning.settings(system))
        assert len(found) == (1 if system in paper_tuning.GRID else 6)
        for fields in found:
            config = paper.row_config(system, 50, paper_tuning.SEED, tmp_path)
            config.update_from_flattened_dict(fields)
            check_config(config)
