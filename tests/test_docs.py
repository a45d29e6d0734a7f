"""The documentation says of the config what is true of it."""

import ast
import pathlib
import re

import pytest
from test_fields import fields

from sammix_jax.config import default_config

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "weights" / "README.md", *sorted(DOCS.glob("*.md")))
ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| (.+?) \| (.+?) \|", re.MULTILINE)
ROWS = ROW.findall((DOCS / "method.md").read_text())

# Sections that the table holds whole, and what else of the method it holds.
WHOLE = ("model", "cam", "loss", "train", "input", "consistency")
ALSO = {
    "data.organ",
    "data.size",
    "data.resize",
    "data.central_fraction",
    "data.slice_range",
    "data.split",
    "data.patient",
    "data.labelled_slices",
    "data.labels_seed",
    "evaluate.protocols",
    "evaluate.gate",
    "evaluate.component",
    "evaluate.nsd_tolerance",
    "evaluate.scans",
}


def test_every_choice_stands_in_the_table_once():
    expected = {f for f in fields(default_config()) if f.split(".")[0] in WHOLE} | ALSO
    assert sorted(field for field, _, _ in ROWS) == sorted(expected)


@pytest.mark.parametrize(("field", "default", "certainty"), ROWS)
def test_defaults_are_the_configs(field, default, certainty):
    value = default_config().to_dict()
    for part in field.split("."):
        value = value[part]
    if field == "train.trainable":  # said in words, in the order of the patterns
        named = ("lora", "prompt_encoder", "mask_decoder", "classifier")
        assert all(name in pattern for name, pattern in zip(named, value, strict=True))
    else:
        assert ast.literal_eval(default.strip("`")) == value
    assert re.match(r"(S|F|L|G|F/G|ours)\b", certainty)


def test_certainty_agrees_with_the_configs_comments():
    """A letter that a field's comment gives its default opens the table's cell too."""
    source = pathlib.Path(default_config.__code__.co_filename).read_text(encoding="utf-8")
    sections = {"inputs": "input"}
    of_the_authors_alternative = {"data.central_fraction", "input.scaling"}
    stated = {}
    for line in source.splitlines():
        match = re.match(r"\s+(\w+)\.(\w+) = .*  # .*?\(([SFLG])\b", line)
        if match:
            section, name, letter = match.groups()
            stated[f"{sections.get(section, section)}.{name}"] = letter
    table = {field: certainty for field, _, certainty in ROWS}
    assert len(stated) > 20
    differing = {
        field: (letter, table[field])
        for field, letter in stated.items()
        if field in table
        and field not in of_the_authors_alternative
        and not re.match(rf"{letter}\b", table[field])
    }
    assert not differing


def anchors(page: pathlib.Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_there_is(page):
    """Modules, files and fields of the config that stand in a page's commands."""
    text, known = page.read_text(), set(fields(default_config()))
    for module in re.findall(r"python -m ((?:sammix_jax|benchmarks|convert)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for file in re.findall(r"(?:configs|requirements|scripts)/[a-z_/]+\.(?:py|txt|sh|yaml)", text):
        assert (ROOT / file).is_file(), file
    for field in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", text):
        assert field in known, field
