"""A hostile chat template ends, makes bounded output, and reaches nothing outside."""

from __future__ import annotations

import pytest

from mmquant.calibration.text.chat import Chat, ChatTemplate, load_template
from mmquant.convert.open import open_native
from mmquant.errors import InputError

CHAT = Chat(({"role": "user", "content": "Hello"},), ())

HOSTILE = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 999999 }}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ [0] * 10000000000 }}",
    "{{ 10 ** 10000000000 }}",
    "{{ 'x'.center(10000000000) }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ 'x' | indent(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '%*d' | format(1000000000, 1) }}",
    "{{ '{:>10000000000}'.format('x') }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content.nothing.nothing }}",
    "{% include '/etc/passwd' %}",
    "{{ strftime_now(7) }}",
    "{{ messages | tojson(indent=10000000000) }}",
    "{{ 'a'.encode('rot13') }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_one_line(source: str) -> None:
    with pytest.raises(InputError, match=r"^model/chat_template\.jinja: ") as caught:
        ChatTemplate(source, {}, "model/chat_template.jinja").render(CHAT)
    assert "\n" not in str(caught.value)


def test_an_ordinary_template_is_not_hindered() -> None:
    template = load_template(open_native("demo"))
    assert template is not None
    once = template.render(CHAT)
    assert "Hello" in once
    assert template.render(CHAT) == once
    source = (
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}"
        "{{ m('%02d' % i) }}{{ loop.index }}{% else %}none{% endfor %}{{ 'a' * 3 }}{{ '%s!' | format('b') }}"
        "{{ '{:>4}'.format('c') }}{{ 'd' | center(3) }}{{ [1, 2] | batch(1) | list | length }}"
    )
    assert ChatTemplate(source, {}, "t").render(CHAT) == "<00>1<02>3aaab!   c d 2"
