"""README.md, CONTRIBUTING.md and docs/ agree with the code and the files that they describe."""

import ast
import re
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.tools import script

DOCS = ROOT / "docs"
TESTING = (DOCS / "testing.md").read_text("utf-8")
SOURCES = [
    ROOT / "pretrain.py",
    *(file for name in ("megatron_bipe", "preprocessing") for file in (ROOT / name).rglob("*.py")),
    *(ROOT / "tools").glob("*.py"),
]


def test_configuration_page_is_generated_from_the_schema():
    with script("_docs") as docs:
        assert (DOCS / "configuration.md").read_text("utf-8") == docs.configuration_page(), "run `make docs`"


def _constant_texts() -> list[str]:
    """Return the string constants of shipped code, with a line break in place of each variable part."""
    texts = []
    for file in SOURCES:
        nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "\n" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(re.sub(r"%[.\d]*[drsf]", "\n", node.value))
    return texts


def test_troubleshooting_quotes_lines_that_the_code_writes():
    texts = [*_constant_texts(), *(ROOT / "Makefile").read_text("utf-8").splitlines()]
    errors = (ROOT / "megatron_bipe" / "errors.py").read_text("utf-8")
    rows = [row for row in (DOCS / "troubleshooting.md").read_text("utf-8").splitlines() if row.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| line |")]
    assert len(rows) >= 40
    missing = []
    for row in rows:
        quoted = row.split(" | ")[0]
        for part in re.findall(r"`([^`]+)`", quoted):
            kind, colon, text = part.partition(":")
            if colon and kind.endswith("Error"):
                assert f"class {kind}(" in errors, kind
                part = text.strip()
            if part and (len(part) < 6 or not any(part in text for text in texts)):
                missing.append(part)
    assert not missing


def test_links_between_pages_lead_to_files_and_headings():
    broken = set()
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages = [*top, ROOT / "ds_configs" / "README.md", *DOCS.rglob("*.md")]
    for page in pages:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", page.read_text("utf-8")):
            target = page.parent / path if path else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.add(f"{page.relative_to(ROOT)} -> {path}#{anchor}")
    assert not broken


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_of_packages_that_pages_name_exist():
    packages = "|".join(folder.name for folder in (ROOT / "megatron_bipe").iterdir() if folder.is_dir())
    named = {
        (page.name, file)
        for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
        for file in re.findall(rf"`((?:{packages})/[\w/]+\.py)\b", page.read_text("utf-8"))
    }
    assert len(named) > 40
    assert not [found for found in named if not (ROOT / "megatron_bipe" / found[1]).is_file()]


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
    named = re.findall(r"`([\w/]+\.py): (\w+(?:, \w+)*)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert len(named) > 40
    for file, names in named:
        path = ROOT / file if (ROOT / file).is_file() else ROOT / "megatron_bipe" / file
        source = path.read_text("utf-8")
        for name in names.split(", "):
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{file}: {name}"
