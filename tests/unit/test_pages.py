"""CONTRIBUTING.md and docs/ name tests, helpers, functions and pages that exist."""

import re

import pytest

from tests.helpers.paths import ROOT

TESTING = (ROOT / "docs" / "testing.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_contract_names_test_files_that_exist():
    table = TESTING.split("## Contract -> where it is tested")[1]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 40
    for contract, tests in rows:
        files = re.findall(r"`([^`]+)`", tests)
        assert files and all((ROOT / "tests" / file).is_file() for file in files), contract


def test_every_helper_that_is_described_exists():
    for file, names in re.findall(r"`(helpers/\w+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", TESTING):
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert all(f"def {name}(" in source for name in re.findall(r"\w+", names)), file


def test_tour_of_the_code_names_functions_and_classes_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"`([\w/]+\.py): (\w+(?:, \w+)*)`", text)
    assert len(named) > 40
    for file, names in named:
        path = ROOT / file if (ROOT / file).is_file() else ROOT / "megatron_bipe" / file
        source = path.read_text("utf-8")
        for name in names.split(", "):
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
        name, _, heading = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in headings}
            assert heading in anchors, target
