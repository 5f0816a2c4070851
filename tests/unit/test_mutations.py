"""The table of mutations fits the tree, so that `python -m tests.mutations` can run."""

import pytest

from tests.helpers.paths import ROOT
from tests.mutations.__main__ import Mutation, load_table


@pytest.mark.parametrize("mutation", load_table(), ids=lambda mutation: mutation.name)
def test_mutation_has_its_code_once_and_its_tests(mutation):
    assert mutation.mutated(ROOT) != (ROOT / mutation.file).read_text()


@pytest.mark.parametrize(
    "changed", [{"code": "no such code"}, {"tests": ["tests/absent.py"]}, {"only": "no_such_name"}, {"file": "absent"}]
)
def test_mutation_that_does_not_fit_is_an_error(changed):
    mutation: Mutation = load_table()[0]
    with pytest.raises(LookupError):
        mutation._replace(**changed).mutated(ROOT)
