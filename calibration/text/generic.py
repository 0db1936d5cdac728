"""The generic part of a calibration: windows of the bundled text beside a user's own.

Nobody's text covers what a model is used for. Second moments of code alone say that what Chinese needs does not count,
and errors are fed into it: calibrated on code alone, all domains together gain 6 % (INT4) to 17 % (IQ2_XXS) by these
windows (docs/lab.md).
"""

from __future__ import annotations

import numpy as np
import torch

from .corpus import Corpus

SHARE = 2.0  # windows of bundled text for one of the user's


def generic_windows(own: int) -> int:
    """Windows of bundled text at most that go with so many of the user's."""
    return max(1, round(SHARE * own))


def together(own: Corpus, generic: Corpus) -> Corpus:
    """Windows of both, interleaved evenly, so that a part is a sample of the whole."""
    parts = (own, generic)
    places = [((torch.arange(len(c.tokens)) + 0.5) / len(c.tokens)) for c in parts]
    order = torch.cat(places).argsort(stable=True)
    sets = [*own.settings["sets"], *({**part, "bundled": True} for part in generic.settings["sets"])]
    return Corpus(
        tokens=torch.cat([c.tokens for c in parts])[order],
        domain=torch.cat((own.domain, generic.domain + len(own.domains)))[order],
        domains=(*own.domains, *(f"bundled {name}" for name in generic.domains)),
        settings={**own.settings, "sets": sets},
        seen=np.concatenate([c.seen for c in parts]),
    )
