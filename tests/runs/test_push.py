"""What `push` makes of its options."""

from __future__ import annotations

import pytest

from mmquant.runs.push import option_fields


@pytest.mark.parametrize("typed", ["mit", " MIT\n", "Mit"])
def test_a_known_licence_is_written_as_hubs_write_it(typed: str) -> None:
    assert option_fields(typed) == {"license": "mit"}
    assert option_fields("Other ") == {"license": "other"}


def test_a_licence_of_its_own_keeps_its_name() -> None:
    own = {"license": "other", "license_name": "My Licence", "license_link": "LICENSE"}
    assert option_fields(" My Licence ") == own
