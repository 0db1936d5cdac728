"""An error is one printable line, whatever it quotes."""

from __future__ import annotations

import pytest

from mmquant.convert.hub.http import HubError
from mmquant.errors import FitError, GateError, InputError, MmquantError, PartialError


@pytest.mark.parametrize("kind", [MmquantError, InputError, PartialError, GateError, FitError, HubError])
def test_what_it_quotes_breaks_no_line_and_no_terminal(kind: type[MmquantError]) -> None:
    assert str(kind("a\nb\r\n\x1b[31mred\x07 \ud800")) == "a b \ufffd[31mred\ufffd \ufffd"
    assert str(kind("model/config.json: é")) == "model/config.json: é"
