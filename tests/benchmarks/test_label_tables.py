"""Tables of the label-efficiency benchmark, from small files whose numbers are known."""

import csv
import math

import pytest
from matplotlib.image import imread

from benchmarks.accuracy.cells import Row, write_cells
from benchmarks.accuracy.label_tables import DIAGNOSTICS, NAMES, label_cells, markdown, plot
from configs.labels import VARIANTS
from sammix_jax.data.files import write_json

DOMAINS, PROTOCOLS = ("portal", "unenhanced"), ("cam", "gt_box")
FIRST, SECOND = {"a": 0.6, "b": 0.8, "c": 1.0}, {"a": 0.4, "b": 0.6, "c": 0.8}


@pytest.fixture
def row(tmp_path):
    """Makes the files of one row, with the Dice of each scan; None where it has no value."""

    def make(dice, variant="sam_mix", count=5, seed=0, domain="portal", box_iou=0.2, auroc=0.9):
        folder = tmp_path / f"{variant}-k{count}-s{seed}" / domain
        folder.mkdir(parents=True)
        with open(folder / "cases.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("scan", "protocol", "status", "dice", "nsd", "hd95_mm", "assd_mm"))
            for scan, value in dice.items():
                writer.writerow((scan, "cam", "scored", value, 0.5, 12.34, None))
        write_json(
            folder / "results.json",
            {
                "scans": list(dice),
                "prompt": {"box_iou": box_iou, "empty_cams": 0.25, "slices": 9},
                "classifier": {"auroc": auroc, "slices": 9},
            },
        )
        return Row(variant, count, seed, domain, folder)

    return make


def table_rows(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines]


def test_a_cell_of_two_seeds(row):
    found = label_cells([row(FIRST), row(SECOND, seed=1)])
    dice = found["sam_mix", 5, "portal", "cam", "dice"]
    assert dice.mean == pytest.approx(0.7)
    assert dice.std == pytest.approx(0.2 / math.sqrt(2))  # of seeds' means 0.8 and 0.6
    # Of three patients the interval is the range: of 0.5, 0.7 and 0.9, each over its seeds.
    assert (dice.low, dice.high) == pytest.approx((0.5, 0.9))
    assert (dice.seeds, dice.patients) == (2, 3)


def test_seeds_may_list_their_scans_in_any_order(row):
    turned = dict(reversed(SECOND.items()))
    dice = label_cells([row(FIRST), row(turned, seed=1)])["sam_mix", 5, "portal", "cam", "dice"]
    assert (dice.mean, dice.low, dice.high) == pytest.approx((0.7, 0.5, 0.9))


def test_one_seed_has_no_spread(row):
    dice = label_cells([row(FIRST)])["sam_mix", 5, "portal", "cam", "dice"]
    assert (dice.mean, dice.std, dice.seeds) == (pytest.approx(0.8), 0, 1)
    assert (dice.low, dice.high) == pytest.approx((0.6, 1.0))


def test_what_is_missing_is_left_out(row):
    found = label_cells([row({**FIRST, "d": None}), row({**SECOND, "d": None}, seed=1)])
    dice = found["sam_mix", 5, "portal", "cam", "dice"]
    assert (dice.mean, dice.patients) == (pytest.approx(0.7), 3)
    assert found["sam_mix", 5, "portal", "cam", "nsd"].patients == 4
    assert ("sam_mix", 5, "portal", "cam", "assd_mm") not in found
    assert {key[3] for key in found} == {"cam", ""}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"a": 0.4, "b": 0.6}, r"\['c'\]"),
        ({"a": 0.4, "b": 0.6, "c": None}, r"\['c'\]"),
        ({"a": 0.4, "b": 0.6, "d": 0.8}, r"\['c', 'd'\]"),
        ({"a": None, "b": None, "c": None}, r"\['a', 'b', 'c'\]"),
    ],
)
def test_seeds_of_other_scans_are_refused(row, other, named):
    rows = [row(FIRST, "teacher", 50), row(other, "teacher", 50, seed=4)]
    with pytest.raises(ValueError, match=rf"teacher, k=50, portal: seeds 0 and 4 .*{named}"):
        label_cells(rows)


def test_domains_may_differ_in_their_scans(row):
    found = label_cells([row(FIRST), row({"x": 0.5}, domain="unenhanced")])
    assert found["sam_mix", 5, "unenhanced", "cam", "dice"].patients == 1


def test_diagnostics_are_means_over_seeds(row):
    found = label_cells([row(FIRST, box_iou=0.2, auroc=None), row(SECOND, seed=1, box_iou=0.4)])
    box_iou, empty, auroc = (found["sam_mix", 5, "portal", "", name] for name in DIAGNOSTICS)
    assert (box_iou.mean, box_iou.std) == pytest.approx((0.3, 0.2 / math.sqrt(2)))
    assert (empty.mean, empty.std, empty.seeds, empty.patients) == (0.25, 0, 2, 3)
    assert (auroc.mean, auroc.seeds) == (0.9, 1)  # the other seed has none
    assert box_iou.low is box_iou.high is None


def test_variants_stand_in_the_order_of_the_config(row):
    made = [row(FIRST, v, k) for k in (50, 5) for v in ("teacher", "no_box", "sam_mix")]
    found = label_cells(made)
    assert list(dict.fromkeys((key[0], key[1]) for key in found)) == [
        (v, k) for v in ("sam_mix", "no_box", "teacher") for k in (5, 50)
    ]
    named = [r[0] for r in table_rows(markdown(found, ("portal",), ("cam",))) if len(r) == 3]
    assert named == ["", "---", "SAM-Mix", "without CAM box", "with teacher"]
    assert list(NAMES) == list(VARIANTS)
    with pytest.raises(ValueError, match="dropout"):
        label_cells([row(FIRST, "dropout")])


def test_markdown(row):
    rows = [row(FIRST), row(SECOND, seed=1), row(FIRST, count=50), row(FIRST, "teacher", 50)]
    text = markdown(label_cells(rows), DOMAINS, PROTOCOLS)
    table = table_rows(text)
    assert [r[:3] for r in table[2:10]] == [
        [k, domain, f"`{protocol}`"] for k in ("5", "50") for domain in DOMAINS
        for protocol in PROTOCOLS
    ]  # fmt: skip
    two, one = table[2], table[6]
    assert two[3] == "0.700 ± 0.141 [0.500, 0.900]" and one[3] == "0.800 [0.600, 1.000]"
    assert two[5] == "12.3 ± 0.0 [12.3, 12.3]" and one[6] == "–"  # digits; no scan has an ASSD
    assert set(table[3][3:]) == {"–"}  # nothing under gt_box

    head, _, sam_mix, teacher = table[10:14]
    assert head == ["", *(f"{domain}, k = {k}" for domain in DOMAINS for k in (5, 50))]
    assert sam_mix == ["SAM-Mix", "0.700 ± 0.141", "0.800", "–", "–"]
    assert teacher == ["with teacher", "–", "0.800", "–", "–"]
    assert text.index("Dice under `cam`") < text.index("Dice under `gt_box`")

    guidance = table[18:]
    assert guidance[0] == ["", "domain", "k", "box IoU", "empty CAMs", "AUROC"]
    assert [r[:3] for r in guidance[2:6]] == [
        ["SAM-Mix", domain, k] for domain in DOMAINS for k in ("5", "50")
    ]
    assert guidance[2][3:] == ["0.200 ± 0.000", "0.250 ± 0.000", "0.900 ± 0.000"]
    assert guidance[3][3:] == ["0.200", "0.250", "0.900"]
    assert guidance[-1] == ["with teacher", "unenhanced", "50", "–", "–", "–"]


def test_the_legend_says_what_the_numbers_are(row):
    legend = markdown(label_cells([row(FIRST)]), DOMAINS, PROTOCOLS).splitlines()[0]
    assert legend.startswith("Means; seeds: 1, patients of a domain: 3. ± is the standard dev")
    assert "the mean of its seeds" in legend and "85% of the time with 5" in legend
    rows = [row(FIRST, seed=s) for s in (1, 2)] + [row({**FIRST, "d": 0.1}, count=50)]
    legend = markdown(label_cells(rows), DOMAINS, PROTOCOLS).splitlines()[0]
    assert legend.startswith("Means; seeds: 1 to 2, patients of a domain: 3 to 4.")


def test_csv_has_every_cell(row, tmp_path):
    found = label_cells([row(FIRST), row(SECOND, seed=1)])
    write_cells(found, tmp_path / "labels.csv")
    with open(tmp_path / "labels.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found) == 6  # Dice, NSD, HD95 and three diagnostics
    first, box_iou = lines[0], next(line for line in lines if line["metric"] == "box_iou")
    assert [first[name] for name in ("variant", "labelled_slices", "domain", "protocol")] == [
        "sam_mix", "5", "portal", "cam"]  # fmt: skip
    assert float(first["mean"]) == found["sam_mix", 5, "portal", "cam", "dice"].mean
    assert (first["metric"], first["seeds"], first["patients"]) == ("dice", "2", "3")
    assert (box_iou["protocol"], box_iou["low"], box_iou["high"]) == ("", "", "")


def test_plot(row, tmp_path):
    rows = [row(FIRST, v, k) for v in ("sam_mix", "teacher") for k in (5, 50)]
    path = tmp_path / "labels.png"
    plot(label_cells(rows), DOMAINS, path)
    height, width, _ = imread(path).shape
    assert path.read_bytes().startswith(b"\x89PNG") and width > 2 * height
