"""Pages of docs/ agree with the code that they describe."""

from tests.helpers.paths import ROOT
from tests.helpers.tools import script

DOCS = ROOT / "docs"


def test_configuration_page_is_generated_from_the_schema():
    with script("_docs") as docs:
        assert (DOCS / "configuration.md").read_text("utf-8") == docs.configuration_page(), "run `make docs`"
