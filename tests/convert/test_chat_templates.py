"""Chat templates and special tokens: found as transformers finds them, carried to GGUF and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmquant.calibration.text.chat import ChatTemplate, load_template
from mmquant.calibration.text.rows import Chat
from mmquant.convert.chat_templates import chat_templates
from mmquant.convert.gguf.metadata import tokenizer_keys
from mmquant.convert.gguf.tokenizer import tokenizer_config
from mmquant.convert.open import demo_folder, open_source
from mmquant.convert.special_tokens import special_tokens
from mmquant.errors import InputError

TOOL = {"type": "function", "function": {"name": "look"}}
CHAT = Chat(({"role": "user", "content": "x"},), ())
WITH_TOOLS = Chat(CHAT.messages, (TOOL,))


def model(tmp_path: Path, files: dict[str, Any], drop: tuple[str, ...] = ()) -> Any:
    """The demo model with other small files; None takes one away. Keys of tokenizer_config.json are merged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in demo_folder().iterdir():
        if path.is_file() and path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    config = json.loads((demo_folder() / "tokenizer_config.json").read_text("utf-8"))
    config = {k: v for k, v in config.items() if k not in ("chat_template", *drop)} | files.pop("config", {})
    for name, value in {"tokenizer_config.json": config, **files}.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return open_source(folder)


NAMED = [{"name": "default", "template": "C"}, {"name": "tool_use", "template": "T"}]
CASES: dict[str, dict[str, Any]] = {
    "config": {"config": {"chat_template": "C"}},
    "file": {"chat_template.jinja": "J"},
    "file over config": {"config": {"chat_template": "C"}, "chat_template.jinja": "J"},
    "named": {"config": {"chat_template": NAMED}},
    "file over named": {"config": {"chat_template": NAMED}, "chat_template.jinja": "J"},
    "folder": {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "A"},
    "folder over named": {
        "config": {"chat_template": NAMED},
        "chat_template.jinja": "J",
        "additional_chat_templates/rag.jinja": "A",
    },
    "folder alone": {"config": {"chat_template": "C"}, "additional_chat_templates/tool_use.jinja": "A"},
    "no default": {"config": {"chat_template": [{"name": "tool_use", "template": "T"}]}},
    "none": {},
}


@pytest.mark.parametrize("name", CASES)
def test_what_transformers_would_render(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    template = load_template(model(tmp_path, dict(CASES[name])))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    for chat in (CHAT, WITH_TOOLS):
        try:
            wanted = theirs.get_chat_template(tools=list(chat.tools) or None)
        except ValueError:
            wanted = None
        if wanted is not None:
            assert template is not None
            assert template.render(chat) == wanted
        elif template is not None:
            with pytest.raises(InputError, match="none is called default"):
                template.render(chat)


def test_a_processors_file_comes_last_and_empty_ones_are_absent(tmp_path: Path) -> None:
    files = {
        "chat_template.json": {"chat_template": "P"},
        "chat_template.jinja": " \n",
        "config": {"chat_template": ""},
    }
    assert [t.text for t in chat_templates(model(tmp_path, files)).values()] == ["P"]


@pytest.mark.parametrize("value", [3, ["x"], [{"name": 3, "template": "x"}], {"default": 3}, [{"template": "x"}]])
def test_a_template_that_is_no_text_is_one_line(tmp_path: Path, value: Any) -> None:
    source = model(tmp_path, {"config": {"chat_template": value}})
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template"):
        load_template(source)


def test_training_templates_are_rendered() -> None:
    text = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<{{ m.content }}>{% endgeneration %}"
    text += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    chat = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), ())
    assert ChatTemplate(text, {}, "x").render(chat) == "q<a>"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing.more }}",
        "{% for m in messages %}",
        "{{ raise_exception('two\nlines') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ undefined_function() }}",
        "{{ messages | first | int | nosuchfilter }}",
        "{{ 'x' * (10 ** 12) }}",
        "{% include 'other' %}",
        "{{ " + "(" * 5000 + " }}",
    ],
)
def test_whatever_a_template_raises_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="model/chat_template") as caught:
        ChatTemplate(text, {}, "model/chat_template.jinja").render(CHAT)
    assert "\n" not in str(caught.value)


IDS = {"bos_token_id": 2043, "eos_token_id": [2042, 2040], "pad_token_id": 2040}


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config": {"bos_token": {"content": "]~!b["}, "eos_token": {"content": "[e~["}}},
        {"special_tokens_map.json": {"bos_token": "]~!b[", "eos_token": {"content": "[e~["}, "pad_token": "]!p~["}},
        {"generation_config.json": IDS},
        {"config": {"bos_token": None, "eos_token": "", "pad_token": None}, "generation_config.json": IDS},
    ],
)
def test_special_tokens_wherever_they_stand(tmp_path: Path, files: dict[str, Any]) -> None:
    """In templates, in GGUF, and back from it."""
    drop = () if not files else ("bos_token", "eos_token", "pad_token")
    source = model(tmp_path, {"chat_template.jinja": "{{ bos_token }}{{ eos_token }}", **files}, drop)
    found = special_tokens(source)
    assert (found["bos"].text, found["bos"].id) == ("]~!b[", 2043)
    assert (found["eos"].text, found["eos"].id) == ("[e~[", 2042)
    template = load_template(source)
    assert template is not None
    assert template.render(CHAT) == "]~!b[[e~["
    keys = {key: value.data for key, value in tokenizer_keys(source).items()}
    assert keys["tokenizer.ggml.bos_token_id"] == 2043
    assert keys["tokenizer.ggml.eos_token_id"] == 2042
    if "pad" in found:
        assert keys["tokenizer.ggml.padding_token_id"] == 2040
    back = json.loads(tokenizer_config(keys))
    assert (back["bos_token"], back["eos_token"]) == ("]~!b[", "[e~[")


def test_named_templates_go_into_gguf_and_come_back(tmp_path: Path) -> None:
    source = model(tmp_path, {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "A"})
    keys = {key: value.data for key, value in tokenizer_keys(source).items()}
    assert keys["tokenizer.chat_template"] == "J"
    assert keys["tokenizer.chat_template.tool_use"] == "A"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    back = {item["name"]: item["template"] for item in json.loads(tokenizer_config(keys))["chat_template"]}
    assert back == {"default": "J", "tool_use": "A"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"added_tokens": [{"id": 3}]}, "content is missing"),
        ({"added_tokens": ["x"]}, r"added_tokens\[0\] is"),
        ({"added_tokens": [{"id": "3", "content": "x"}]}, "id is '3'"),
        ({"model": {"type": "BPE", "vocab": {"a": None}}}, "is None, expected an integer"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[1, 2]]}}, "the merge .*, expected two tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [3]}}, "the merge .*, expected two tokens"),
    ],
)
def test_a_vocabulary_of_another_form_is_one_line(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    whole = json.loads((demo_folder() / "tokenizer.json").read_text("utf-8"))
    source = model(tmp_path, {"tokenizer.json": {**whole, **change}})
    with pytest.raises(InputError, match=reason):
        tokenizer_keys(source)
