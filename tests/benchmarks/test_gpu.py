"""The GPU's tables, by what needs no GPU: operations, rows, and what a failed cell leaves."""

import dataclasses

import jax
import pytest

from benchmarks import gpu
from sammix_jax.flops import count_flops
from sammix_jax.models.sam import VARIANTS
from sammix_jax.models.sam.image_encoder import ImageEncoder


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_operations_are_those_of_the_traced_encoder():
    """At one window an image no token is padding; the trace counts position besides."""
    sizes = VARIANTS["vit_b"]
    side = sizes.window_size * sizes.patch_size
    encoder = ImageEncoder(dataclasses.replace(sizes, image_size=side))
    images = jax.ShapeDtypeStruct((1, side, side, 3), "float32")
    params = jax.eval_shape(encoder.init, jax.random.key(0), images)
    counted = count_flops(encoder.apply, params, images)
    assert 1 < counted / gpu.encoder_flops(sizes, side) < 1.02


def test_rows_have_the_columns_of_their_headers(capsys, monkeypatch):
    found = {
        "pytorch": {"time": 0.8, "peak": 4.0, "device": "NVIDIA H200"},
        "compiled": {"time": 0.2, "peak": 3.0, "device": "NVIDIA H200"},
        "jax": {"time": 0.1, "peak": 2.0, "device": "NVIDIA H200"},
    }

    def measured(form, what, sides):
        return {side: found[form] for side in sides if form in found and side == 1024}

    monkeypatch.setattr(gpu, "measure_apart", measured)
    monkeypatch.setattr("sys.argv", ["gpu", "--sides", "512", "1024", "--step_sides", "1024"])
    gpu.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    header, rule, nothing, encoder, steps, rule_of_steps, step = map(cells, lines)
    assert len(header) == len(rule) == len(nothing) == len(encoder)
    assert len(steps) == len(rule_of_steps) == len(step)
    assert nothing[3:] == ["–"] * 8
    rate = gpu.encoder_flops(VARIANTS["vit_b"], 1024) * 8 / 0.1
    shares = [f"{rate / 1e12:.0f}", f"{rate / 989e12:.0%}"]
    assert encoder == [
        "vit_b",
        "1024",
        "8",
        "100.000",
        "–",
        "25.000",
        "12.500",
        "8.00",
        "2.00",
        *shares,
    ]
    speeds, ratios, peaks = (
        ["10.0", "–", "40.0", "80.0"],
        ["8.00", "2.00"],
        ["4.0", "–", "3.0", "2.0"],
    )
    assert step == ["1024", "4 + 4", *speeds, *ratios, *peaks]


def test_the_median_of_measures_after_a_warm_up():
    calls, waited = [], []
    found = gpu.timed(lambda: calls.append(0), waited.append)
    assert 0 < found["low"] <= found["time"] <= found["high"]
    assert len(calls) > gpu.MEASURES and len(waited) == 3 + gpu.MEASURES


def test_a_form_that_fails_is_told(capfd):
    assert gpu.measure_apart("jax", "step", [7]) == {}
    assert "jax step failed" in capfd.readouterr().err


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA T4"])
def test_a_share_of_the_peak_where_it_is_known(device):
    row = gpu.encoder_row("vit_b", 256, {"jax": {"time": 0.1, "device": device}})
    assert (cells(row)[-1] == "–") == ("T4" in device)
