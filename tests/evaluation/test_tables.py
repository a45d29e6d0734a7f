"""Results as text."""

from sammix_jax.evaluation.tables import paper_rows, result_table, text, volume_rows


def moments(mean, std=0.01, count=6):
    low, high = (mean - std, mean + std) if count > 2 else (None, None)
    return {"mean": mean, "std": std, "count": count, "low": low, "high": high}


def scores(**changes):
    return {
        "scored": 6,
        "failures": 1,
        "not_scored": 0,
        "dice": moments(0.897),
        "nsd": moments(0.912),
        "hd95_mm": moments(119.7, 109.44),
        "assd_mm": moments(14.0, 11.2),
        "absolute_volume_error": moments(0.05),
        "slice_dice": moments(0.825),
        "slice_hausdorff_px": moments(21.7, 4.7),
        "false_positive_ml": moments(3.21, 1.5),
        **changes,
    }


def results(**changes):
    return {
        "evaluate": {"nsd_tolerance": 2.0},
        "summary": {"cam": scores(**changes), "gt_box": scores(), "none": scores()},
        "classifier": {"accuracy": 0.95, "f1": 0.9, "auroc": None, "slices": 100},
        "prompt": {"box_iou": 0.61, "empty_cams": 0.02, "slices": 50},
    }


def test_every_score_and_its_protocol():
    table = result_table(results())
    lines = table.splitlines()
    assert [line.split()[0] for line in lines if line][:5] == [
        "protocol", lines[1].strip(), "cam", "gt_box", "none"]  # fmt: skip
    assert "0.897 ± 0.010 [0.887, 0.907]  0.912 ± 0.010  119.7 ± 109.4  14.0 ± 11.2" in table
    assert "NSD 2 mm" in lines[0] and "not scored" in lines[0]
    assert "to compare with the paper: slices with the organ, 256x256 px" in table
    assert "21.7 ± 4.7" in table
    assert "classifier  accuracy 0.950, F1 0.900, AUROC –" in table
    assert "prompt      box IoU 0.610, empty CAMs 0.020" in table
    assert "[mL]  cam 3.2 ± 1.5, gt_box 3.2 ± 1.5, none 3.2 ± 1.5" in table
    assert max(map(len, lines)) <= 125


def test_what_is_not_known_is_not_made_up():
    assert text(scores(dice=None), "dice") == "–"
    assert text(scores(dice=moments(0.9, 0, 1)), "dice", interval=True) == "0.900"
    assert text(scores(dice=moments(0.9, 0.1, 2)), "dice", interval=True) == "0.900 ± 0.100"
    assert text(scores(), "dice", spread=False) == "0.897"


def test_scores_of_fewer_scans_say_of_how_many():
    found = results(hd95_mm=moments(9.0, 1.0, 4), slice_dice=moments(0.8, 0.1, 5))
    rows = {row[0]: row for row in volume_rows(found)}
    assert rows["cam"][3:5] == ("9.0 ± 1.0 (of 4)", "14.0 ± 11.2")
    assert rows["gt_box"][3] == "119.7 ± 109.4"
    assert paper_rows(found)[1] == ("cam", "0.800 ± 0.100 (of 5)", "21.7 ± 4.7")


def test_means_over_runs_round_no_failure_away():
    """Runs of 6, 6 and 5 scans, of which one has no distance in one run."""
    over = {"mean": 10.0, "std": 1.0, "count": 3, "scans": 16 / 3}
    scored, failures = ({"mean": m, "std": 0.58, "count": 3} for m in (17 / 3, 1 / 3))
    dice = {"mean": 0.9, "std": 0.1, "count": 3, "scans": 17 / 3}
    found = results(hd95_mm=over, dice=dice, scored=scored, failures=failures)
    row = volume_rows(found)[1]
    assert row[1] == "0.900 ± 0.100" and row[3] == "10.0 ± 1.0 (of 5.33)"
    assert row[-3:] == ("5.7 ± 0.6", "0.3 ± 0.6", "0")


def test_a_tolerance_stands_in_the_head():
    other = results()
    other["evaluate"]["nsd_tolerance"] = 0.5
    assert volume_rows(other)[0][2] == "NSD 0.5 mm"
    assert paper_rows(other)[1] == ("cam", "0.825 ± 0.010", "21.7 ± 4.7")
