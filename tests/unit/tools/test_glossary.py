"""The search for words that the glossary replaces."""

import yaml

from tests.helpers.paths import ROOT
from tests.helpers.tools import script


def test_glossary_finds_replaced_words_in_text_only_and_allows_correct_uses():
    words = yaml.safe_load((ROOT / "tools" / "glossary.yaml").read_text("utf-8"))
    with script("_glossary") as glossary:
        replace = dict(zip(glossary.compiled(list(words["replace"])), words["replace"].values(), strict=True))

        def find(text, name):
            found = glossary.find(text, name, replace, glossary.compiled(words["allow"]))
            return [message.split(";")[0] for message in found]

    code = '"""The\nwhole file."""\nwindow = 1  # passed over\nprint("Mend `windows` in place")\n'
    assert find(code, "a.py") == ["a.py:2: 'whole'", "a.py:3: 'passed over'", "a.py:4: 'Mend'"]
    assert find("It shows a sign\n# of life, and there is no window.\n", "a.md") == [
        "a.md:1: 'sign # of life'",
        "a.md:2: 'window'",
    ]
    assert find("There is no error in one place.\n", "a.md") == []
