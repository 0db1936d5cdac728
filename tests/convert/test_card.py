"""Licences by their words, and the front matter that may stand beside them."""

from __future__ import annotations

import pytest

from mmquant.convert.card import check_license, is_repository, license_fields, split_card
from mmquant.convert.licence import PROHIBITED, judge
from mmquant.convert.open import demo_folder
from mmquant.errors import InputError

GRANT = "Permission is hereby granted, free of charge, to any person obtaining a copy\n"
TEXTS = {
    "NON-COMMERCIAL LICENSE\nCopyright (c) 2026 MiniMax": ("other", "minimax-m2.7-non-commercial", PROHIBITED),
    "Non-Commercial Licence of somebody": ("other", "non-commercial", PROHIBITED),
    "MIT License\n\nCopyright\n" + GRANT: ("mit", None, "allowed"),
    "Modified MIT License\n\nCopyright\n" + GRANT: ("other", "modified-mit", "allowed"),
    "Apache License\nVersion 2.0": ("apache-2.0", None, "allowed"),
    "something else": ("other", "see-license-file", "unknown"),
    "": ("other", "see-license-file", "unknown"),
}


@pytest.mark.parametrize("text, expected", TEXTS.items())
def test_a_licence_is_known_by_its_words(text: str, expected: tuple[str, str | None, str]) -> None:
    found = judge(text)
    assert (found.id, found.name, found.use) == expected


def test_the_demos_licence() -> None:
    assert judge((demo_folder() / "LICENSE").read_text()).id == "apache-2.0"


def test_fields_come_from_the_card_and_then_from_the_file() -> None:
    forbids, mit = next(iter(TEXTS)), list(TEXTS)[2]
    assert license_fields(None, forbids)["license_name"] == "minimax-m2.7-non-commercial"
    assert license_fields("---\nlicense: other\n---\n", mit)["license_name"] == "see-license-file"
    assert license_fields("# no front matter", mit) == {"license": "mit"}
    kept = {"license": "mit", "license_name": "modified-mit"}
    assert license_fields("---\nlicense: mit\nlicense_name: modified-mit\n---\n", mit) == kept
    with pytest.raises(InputError, match=r"license: apache-2\.0, but the licence file forbids commercial use"):
        check_license({"license": "Apache-2.0"}, forbids, "x")


def test_a_front_matter_with_a_byte_order_mark_is_read() -> None:
    assert split_card("\ufeff---\nlicense: mit\n---\nText") == ({"license": "mit"}, "Text")


@pytest.mark.parametrize("name", ["m27", "m27 local", "/data/m27", "../a/b", "a/b/c", "a/..", None, 7, ["a/b"]])
def test_what_is_no_repository(name: object) -> None:
    assert not is_repository(name)
