"""Judge one reply: tool call or not, arguments against their schema, thinking, language, order, repetition.

The rates are those of MiniMax-Provider-Verifier (https://github.com/MiniMax-AI/MiniMax-Provider-Verifier), with two
more: tags of thinking or tool calls that the server left in the text, and repetition.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...convert.files.parse import is_list, is_object
from ...convert.models import ARCHITECTURES
from .prompts import Case

TAGS = re.compile("|".join(row.serving.markup for row in ARCHITECTURES.values() if row.serving and row.serving.markup))
THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
PIECES = range(2, 201)  # characters of what comes again and again
TIMES = 6
SCRIPTS = {"zh": "CJK", "ja": "KANA", "ko": "HANGUL", "ru": "CYRILLIC", "ar": "ARABIC"}
# The commonest short words of languages in Latin letters.
COMMON = {
    "en": "the and of to is in that it for with as are be this by from at when because which into",
    "de": "der die das und ist in zu den mit sich des auf für nicht ein eine wird von im dem weil dann",
    "fr": "le la les et est de des un une en du que dans pour qui sur au avec par plus il puis car",
    "es": "el la los y es de un una en que se las con para por del al lo como más luego porque su",
    "pt": "o a os e é de um uma em que se as com para por do da no na como mais depois porque ao",
}


@dataclass(frozen=True)
class Reply:
    """What a server answered: text, thinking, calls as (name, arguments as they came), why it ended."""

    content: str
    reasoning: str
    calls: tuple[tuple[str, str], ...]
    finish: str


@dataclass(frozen=True)
class Verdict:
    """What was found; None where the prompt does not ask for it."""

    called: bool
    match: bool | None
    schema: bool | None
    only_reasoning: bool
    thought: bool
    broken_tags: bool
    language: bool | None
    scenario: bool | None
    repeats: bool


def judge(case: Case, reply: Reply) -> Verdict:
    """The verdict on one reply to a prompt."""
    called = bool(reply.calls)
    text = THOUGHT.sub("", reply.content, count=1)
    thought = bool(reply.reasoning.strip()) or text != reply.content
    expected = {"call": True, "answer": False}.get(case.expects or "")
    spoken = case.language if not called and text.strip() else None
    return Verdict(
        called=called,
        match=None if expected is None else called == expected,
        schema=all(fits_schema(case, name, arguments) for name, arguments in reply.calls) if called else None,
        only_reasoning=thought and not called and not text.strip(),
        thought=thought,
        broken_tags=TAGS.search(text) is not None,
        language=is_language(text, spoken) if spoken else None,
        scenario=in_order(text, case.tokens) if case.tokens else None,
        repeats=any(is_loop(part) for part in (text, reply.reasoning)),
    )


def is_loop(text: str) -> bool:
    """Whether a text ends in the same piece six times over; blanks may follow."""
    tail, most = text[-4000:], PIECES.stop * TIMES
    ends = range(len(tail.rstrip()), len(tail) + 1)[: PIECES.stop]
    parts = (tail[max(0, end - most) : end] for end in ends)
    return any(part.endswith(part[-size:] * TIMES) for part in parts for size in PIECES if size <= len(part))


def fits_schema(case: Case, name: str, arguments: str) -> bool:
    """Whether a call names a tool of the prompt and its arguments are JSON that fits the tool's schema."""
    import jsonschema

    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in case.tools}
    if name not in schemas:
        return False
    try:
        found: object = json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return is_object(found) and jsonschema.Draft202012Validator(schemas[name]).is_valid(found)


def in_order(text: str, tokens: tuple[str, ...]) -> bool:
    """Whether the first mentions of all tokens come in this order."""
    places = [text.find(token) for token in tokens]
    return all(place >= 0 for place in places) and places == sorted(places)


def is_language(text: str, language: str) -> bool:
    """Whether a text is in a language: by its script, for Latin letters by its commonest words."""
    letters = [_script(c) for c in text if c.isalpha()]
    if not letters:
        return False
    share = {name: letters.count(name) / len(letters) for name in set(letters)}
    if language == "zh":
        return share.get("CJK", 0) > 0.6 and share.get("KANA", 0) < 0.05
    if language == "ja":
        return share.get("KANA", 0) > 0.15 and share.get("KANA", 0) + share.get("CJK", 0) > 0.6
    if language in SCRIPTS:
        return share.get(SCRIPTS[language], 0) > 0.6
    words = re.findall(r"[^\W\d_]+", text.lower())
    counts = {name: sum(word in set(common.split()) for word in words) for name, common in COMMON.items()}
    best = max(counts.values())
    return share.get("LATIN", 0) > 0.6 and best > 0 and counts.get(language) == best


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if name.startswith(("HIRAGANA", "KATAKANA")):
        return "KANA"
    return name.split(" ")[0]


def read_reply(body: Mapping[str, Any]) -> Reply:
    """The reply in a body of /chat/completions. ValueError when it is none."""
    choices = body.get("choices")
    choice: object = choices[0] if is_list(choices) and choices else None
    message: object = choice.get("message") if is_object(choice) else None
    if not is_object(choice) or not is_object(message):
        raise ValueError("no choices[0].message")
    calls: object = message.get("tool_calls") or []
    if not is_list(calls):
        raise ValueError("tool_calls is no list")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    return Reply(str(content), str(reasoning), tuple(_call(call) for call in calls), str(choice.get("finish_reason")))


def _call(call: object) -> tuple[str, str]:
    function: object = call.get("function") if is_object(call) else None
    if not is_object(function):
        raise ValueError("a tool call without function")
    arguments: object = function.get("arguments")
    return str(function.get("name")), arguments if isinstance(arguments, str) else json.dumps(arguments)
