"""The table of contracts in docs/contributing.md names tests that exist."""

import re

from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "contributing.md").read_text("utf-8")


def test_every_contract_names_test_files_that_exist():
    table = PAGE.split("## Contract -> where it is tested")[1]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 40
    for contract, tests in rows:
        files = re.findall(r"`([^`]+)`", tests)
        assert files and all((ROOT / "tests" / file).is_file() for file in files), contract


def test_every_helper_that_is_described_exists():
    for file, names in re.findall(r"`(helpers/\w+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", PAGE):
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert all(f"def {name}(" in source for name in re.findall(r"\w+", names)), file
