"""The properties of tests/test_properties.py on more examples, from the campaign's seed."""

import pytest

from tests.campaign.harness import rng_of, scaled
from tests.test_properties import PROPERTIES, try_property

pytestmark = pytest.mark.campaign("properties")

PARTS, FACTOR = 8, 5  # tests of one property, each of so many times the examples of make test


@pytest.mark.parametrize("part", range(scaled(PARTS)))
@pytest.mark.parametrize("name", list(PROPERTIES))
def test_property_on_more_examples(name, part, tally):
    number = PROPERTIES[name][2] * FACTOR
    tally.case(number)
    tally.note(*[name] * number)
    try:
        try_property(name, number, rng_of("property", name, part).randrange(2**31))
    except Exception as error:
        notes = "\n".join(getattr(error, "__notes__", []))  # hypothesis says which example it was
        tally.fault("wrong bits", f"{name}: {error!r} {notes}")
    tally.check()
