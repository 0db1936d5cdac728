"""Judge by a licence file's words what it permits, for manifests and model cards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .models import ARCHITECTURES

LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL")
UNKNOWN_NAME = "see-license-file"
PROHIBITED = "prohibited-without-authorization"
PERMISSIVE = re.compile(
    r"mit|apache-2\.0|bsd(-[23]-clause)?(-clear)?|isc|unlicense|cc0-1\.0|cc-by(-sa)?-\d\.\d|[al]?gpl(-\d\.\d)?"
)


@dataclass(frozen=True)
class Licence:
    """`id` and `name`: the card's license and license_name; `use`: the manifest's commercial_use."""

    id: str
    name: str | None
    link: str
    use: str


def judge(text: str) -> Licence:
    """The licence that a file's text is; `other` where it is none of those that this family is published under."""
    words = " ".join(text.lower().split())
    if "non-commercial" in words:
        named = next((r.licence for r in ARCHITECTURES.values() if r.licence and r.licence.word in words), None)
        name, link = ("non-commercial", "") if named is None else (named.name, named.link)
        return Licence("other", name, link, PROHIBITED)
    if "apache license" in words:
        return Licence("apache-2.0", None, "https://www.apache.org/licenses/LICENSE-2.0", "allowed")
    if "permission is hereby granted, free of charge" in words:
        changed = "modified" in words.partition("permission is hereby granted")[0]
        return Licence("other" if changed else "mit", "modified-mit" if changed else None, "", "allowed")
    return Licence("other", UNKNOWN_NAME, "", "unknown")
