"""`verify` against real servers: one that answers well, faulty ones, and llama.cpp's own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

import mmquant
from helpers.chat_server import ChatServer, said
from helpers.paths import ROOT, SOURCE
from mmquant.commands.cli import cli
from mmquant.convert.open import demo_folder
from mmquant.errors import GateError, InputError, MmquantError
from mmquant.runs.options_use import VerifyOptions
from mmquant.runs.verify import client
from mmquant.runs.verify import engine as verify_engine
from mmquant.runs.verify import run as verify_run
from mmquant.runs.verify.engine import serving
from mmquant.runs.verify.judge import Reply, fits_schema, in_order, is_language, judge
from mmquant.runs.verify.prompts import Case, read_prompts
from mmquant.runs.verify.record import put, write_html
from mmquant.runs.verify.score import compare, interval, missed, rates

CASES = {case.id: case for case in read_prompts(None)}
QUICK = VerifyOptions(language=("en", "zh"), retries=1, timeout=5)
BREAD = {
    "en": "The dough is kneaded and left to rise, and then it is baked in the oven.",
    "zh": "先把面粉和水揉成面团，让它发酵，然后放进烤箱里烤熟。",
}


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_run, "PAUSE", 0.0)


def good(body: dict[str, Any]) -> dict[str, Any]:
    """What a sound model answers."""
    last = body["messages"][-1]
    text = last["content"]
    if last["role"] == "tool" or "sky" in text or "天空" in text or "tools" not in body:
        first = body["messages"][0]["content"]
        return said(BREAD["zh" if any("一" <= c <= "鿿" for c in first) else "en"], "I know this.")
    if "4711" in text:
        return said("", "Cancel.", [("cancel_order", json.dumps({"order_id": 4711, "reason": "wrong size"}))])
    if "List the parameter" in text:
        name = text.split("tool ")[1].split(" ")[0]
        (tool,) = [t["function"] for t in body["tools"] if t["function"]["name"] == name]
        return said(", ".join(tool["parameters"]["properties"]), "In order.")
    return said("", "Look.", [("get_weather", json.dumps({"city": "Lisbon", "day": "tomorrow"}))])


def test_the_documents_say_how_many_prompts_there_are() -> None:
    for place in ("commands/verify.py", "docs/verify.md", "docs/serving.md"):
        text = ((SOURCE if place.endswith(".py") else ROOT) / place).read_text()
        assert re.findall(r"(\d+) (?:such )?prompts", text) == [str(len(CASES))], place


def schema() -> dict[str, Any]:
    path = resources.files("mmquant").joinpath("data", "schema", "mmquant-verify-1.schema.json")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_sound_server_passes(stream: bool) -> None:
    with ChatServer(good) as server:
        found = mmquant.verify(server.url, VerifyOptions(language=("en", "zh"), stream=stream))
    jsonschema.validate(found.document, schema())
    assert not found.document["missed"]
    found.check()
    assert {n: r["rate"] for n, r in found.document["rates"].items()} == {
        **dict.fromkeys(("success", "match", "schema", "thought", "language"), 1.0),
        **dict.fromkeys(("only_reasoning", "broken_tags", "repeats"), 0.0),
        "scenario": None,
    }
    assert len(server.asked) == len(found.document["prompts"]) == 10
    assert all(body["temperature"] == 1.0 and body["top_k"] == 40 for body in server.asked)


def test_scenarios_see_sorted_keys() -> None:
    def sorting(body: dict[str, Any]) -> dict[str, Any]:
        return good(json.loads(json.dumps(body, sort_keys=True)))

    for answer, rate in ((good, 1.0), (sorting, 0.0)):
        with ChatServer(answer) as server:
            document = mmquant.verify(server.url, VerifyOptions(concurrency=8)).document
        scenario = document["rates"]["scenario"]
        assert scenario["of"] == 3
        assert scenario["rate"] == rate if rate else scenario["rate"] < 1


def wrong_schema(body: dict[str, Any]) -> dict[str, Any]:
    made = good(body)
    for call in made["choices"][0]["message"]["tool_calls"] or []:
        call["function"]["arguments"] = '{"order_id": "4711"}'
    return made


def only_thinks(body: dict[str, Any]) -> dict[str, Any]:
    return said("", "Hmm.")


def loose_tags(body: dict[str, Any]) -> dict[str, Any]:
    return said("so it is</think><minimax:tool_call><invoke name='get_weather'>" + BREAD["en"])


def loops(body: dict[str, Any]) -> dict[str, Any]:
    return said("the end. " + "and so on, " * 40)


@pytest.mark.parametrize(
    ("answer", "rate", "value"),
    [
        (wrong_schema, "schema", 0.0),
        (only_thinks, "only_reasoning", 1.0),
        (loose_tags, "broken_tags", 1.0),
        (loops, "repeats", 1.0),
    ],
)
def test_a_fault_is_seen_in_its_rate(answer: Any, rate: str, value: float) -> None:
    with ChatServer(answer) as server:
        document = mmquant.verify(server.url, QUICK).document
    assert document["rates"][rate]["rate"] == value


CUT = "connection lost|no JSON|finish"


@pytest.mark.parametrize(
    ("broken", "stream", "word"),
    [
        (500, False, "HTTP 500"),
        (400, False, "HTTP 400"),
        (b"{not json", False, CUT),
        ("{not json", False, "no JSON"),
        ("[" * 100_000, False, "no JSON"),
        (b'data: {"choices": [{"delta": {"content": "half"}}]}\n\n', True, CUT),
        ({"error": "no"}, False, "no choices"),
        ({"choices": [{"message": {"tool_calls": [3]}}]}, False, "without function"),
    ],
)
def test_a_server_that_never_answers_is_one_line(broken: Any, stream: bool, word: str) -> None:
    with ChatServer(lambda body: broken) as server, pytest.raises(MmquantError, match=word) as error:
        mmquant.verify(server.url, VerifyOptions(language=("en",), retries=1, stream=stream))
    assert not isinstance(error.value, InputError)
    assert len(server.asked) == (5 if broken == 400 else 10)  # what is no use is not asked again


def test_a_server_that_hangs_is_given_up() -> None:
    never = threading.Event()
    with ChatServer(lambda body: 500 + never.wait(30)) as server:
        options = VerifyOptions(language=("en",), retries=0, timeout=1, concurrency=5)
        with pytest.raises(MmquantError, match="no bytes arrived in time"):
            mmquant.verify(server.url, options)
        never.set()


def test_lost_answers_are_asked_again_and_then_counted() -> None:
    tries: dict[str, int] = {}

    def flaky(body: dict[str, Any]) -> dict[str, Any] | int:
        key = json.dumps(body["messages"], sort_keys=True)
        tries[key] = tries.get(key, 0) + 1
        dead = "4711" in key
        return 503 if dead or tries[key] == 1 else good(body)

    with ChatServer(flaky) as server:
        document = mmquant.verify(server.url, QUICK).document
    assert document["rates"]["success"] == {**document["rates"]["success"], "hits": 8, "of": 10}
    assert document["missed"] == ["success 0.800, expected at least 1"]
    with pytest.raises(GateError):
        verify_run.Verified(document).check()


def test_a_run_continues_with_the_answers_that_it_has(tmp_path: Path) -> None:
    options = VerifyOptions(language=("en", "zh"), retries=0, state=tmp_path / "s", concurrency=1)
    count = 0

    def dies(body: dict[str, Any]) -> dict[str, Any] | int:
        nonlocal count
        count += 1
        return good(body) if count <= 6 else 500

    with ChatServer(dies) as server:
        first = mmquant.verify(server.url, options).document
        assert first["rates"]["success"]["hits"] == 6
        path = tmp_path / "s" / "answers.jsonl"
        path.write_bytes(path.read_bytes() + b'{"key": "zh/te')  # killed in the middle of a line
        count = 0
        again = mmquant.verify(server.url, options).document
        assert again["rates"]["success"]["rate"] == 1.0
        assert count == 4
        count = 0
        assert mmquant.verify(server.url, options).document["prompts"] == again["prompts"]
        assert count == 0
        with pytest.raises(InputError, match="answers of another server, model or set of prompts"):
            mmquant.verify(server.url, VerifyOptions(language=("en",), state=tmp_path / "s"))


def test_two_servers_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    def deaf(body: dict[str, Any]) -> dict[str, Any]:
        made = good(body)
        return said(BREAD["en"], "No.") if "4711" in body["messages"][0]["content"] else made

    with ChatServer(deaf) as ours, ChatServer(good) as theirs:
        found = mmquant.verify(ours.url, VerifyOptions(language=("en", "zh"), against=theirs.url, loops=2))
    compared = found.document["comparison"]
    assert compared["pairs"] == 20
    assert compared["trigger_similarity"] == pytest.approx(2 * 4 / (2 * 4 + 4))
    assert compared["rates"]["match"] == {"ours_alone": 0, "reference_alone": 4, "p": 0.125}
    assert compared["different"] == [f"{name}/order#{loop}" for loop in range(2) for name in ("en", "zh")]
    assert any("trigger similarity 66.67 %" in line for line in found.lines())
    write_html(tmp_path / "v.html", found.document)
    assert "en/order#0" in (tmp_path / "v.html").read_text()


def test_the_key_goes_to_the_server_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "word")
    with ChatServer(good) as server:
        mmquant.verify(server.url, VerifyOptions(language=("en",), key_variable="MY_KEY"))
    assert server.keys == {"Bearer word"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_thinking_is_found_by_either_name(field: str, stream: bool) -> None:
    with ChatServer(lambda body: said(BREAD["en"], "I know this.", field=field)) as server:
        document = mmquant.verify(server.url, VerifyOptions(language=("en",), stream=stream)).document
    assert document["rates"]["thought"]["rate"] == 1.0


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_wants_another_key_is_told_so(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(good, status) as server:
        with pytest.raises(InputError, match=f"models: HTTP {status}, the key is missing; --key-variable names what"):
            mmquant.verify(server.url, QUICK)
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        with pytest.raises(InputError, match="the key was refused"):
            mmquant.verify(server.url, QUICK)


def test_a_network_that_fails_is_no_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, and what to do; the second server's likewise."""
    monkeypatch.setattr(client, "LIMIT", 1000)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
        asked = CliRunner().invoke(cli, ["verify", closed])
        assert isinstance(asked.exception, MmquantError)
        start = "start one (vllm serve DIR, llama-server -m FILE), or give --model and --engine in place of the URL"
        expected = "nothing listens there, expected an OpenAI-compatible server"
        assert str(asked.exception) == f"{closed}/v1/models: {expected}; {start}"
        with ChatServer(good) as server, pytest.raises(MmquantError, match=f"{closed}/v1/models: {expected}") as error:
            mmquant.verify(server.url, VerifyOptions(against=closed))
        assert error.value.exit_code == asked.exception.exit_code == 1
        assert not server.asked
    for models, words in ((503, "HTTP 503"), (b"x" * 1001, "more than 0 MiB of answer")):
        with ChatServer(good, models) as server, pytest.raises(MmquantError, match=f"models: {words}") as error:
            mmquant.verify(server.url, QUICK)
        assert error.value.exit_code == 1
    for models, words in ((404, "HTTP 404"), (b"no JSON", "not JSON")):
        with ChatServer(good, models) as server, pytest.raises(InputError, match=f"models.* {words}"):
            mmquant.verify(server.url, QUICK)


@pytest.mark.parametrize("models", [[], ["a", "b"]])
def test_a_server_without_one_model_wants_its_name(models: list[str]) -> None:
    with ChatServer(good, models) as server:
        with pytest.raises(InputError, match="expected one model; name it with --served-model"):
            mmquant.verify(server.url, QUICK)
        assert (
            mmquant.verify(server.url, VerifyOptions(language=("en",), served_model="b")).document["run"]["model"]
            == "b"
        )


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:b@c", "http://x/?q=1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected http"):
        mmquant.verify(url)


def test_rates_reach_manifest_and_card(tmp_path: Path) -> None:
    from mmquant.convert.hub.card_text import generated
    from mmquant.convert.manifest import read

    made = mmquant.quantize_fp8("demo", tmp_path / "a")
    with ChatServer(good) as server:
        put(made.path, mmquant.verify(server.url, QUICK).document)
    manifest = read(made.path)
    assert manifest is not None
    text = generated(manifest, "hf", "me/x", "")
    assert "| type | success | match | schema | only reasoning |" in text
    assert "| FP8-block | 100.0 | 100.0 | 100.0 | 0.0 |" in text
    with pytest.raises(InputError, match=r"mmquant.fit.json is missing"):
        put(tmp_path, {"generated": "", "run": {}, "rates": {}, "missed": []})


def test_llama_cpp_serves_and_is_judged(tmp_path: Path) -> None:
    """The demo model knows no tools: what counts is that a real server's replies are read and judged."""
    pytest.importorskip("xllamacpp")
    made = mmquant.quantize_gguf("demo", tmp_path / "g", mmquant.GgufOptions(type="Q8_0"))
    with serving(made.path, "llama.cpp", 2048) as url:
        options = VerifyOptions(language=("en",), max_tokens=16, retries=0, concurrency=1)
        document = mmquant.verify(url, options).document
        streamed = mmquant.verify(url, VerifyOptions(language=("en",), max_tokens=16, retries=0, stream=True)).document
    jsonschema.validate(document, schema())
    assert document["rates"]["success"]["rate"] == streamed["rates"]["success"]["rate"] == 1.0


CHATTY = """import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        print("x" * 10**6, file=sys.stderr, flush=True)
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_may_log_what_it_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chatty(model: Path, engine: str, port: int, *_: object) -> list[str]:
        return [sys.executable, "-c", CHATTY, str(port)]

    monkeypatch.setattr(verify_engine, "_command", chatty)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(tmp_path, "vllm", 1) as url:
        assert url.startswith("http://127.0.0.1:")
    assert not [*tmp_path.iterdir()]  # its log is gone with it


def test_a_server_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys; sys.exit('no such card')"
    monkeypatch.setattr(verify_engine, "_command", lambda *_: [sys.executable, "-c", code])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(MmquantError, match="vllm ended with 1: no such card; its log: ") as raised:
        with serving(tmp_path, "vllm", 1):
            pass
    (log,) = tmp_path.iterdir()
    assert str(raised.value).endswith(str(log))
    assert log.read_text() == "no such card\n"


@pytest.mark.parametrize(
    ("name", "arguments", "fits"),
    [
        ("cancel_order", '{"order_id": 1, "reason": "x"}', True),
        ("cancel_order", '{"order_id": 1}', False),
        ("cancel_order", '{"order_id": 1, "reason": "x", "more": 1}', False),
        ("cancel_order", "{", False),
        ("cancel_order", "[" * 100_000, False),
        ("cancel_order", "[]", False),
        ("other", "{}", False),
    ],
)
def test_calls_are_held_against_their_schema(name: str, arguments: str, fits: bool) -> None:
    assert fits_schema(CASES["en/order"], name, arguments) is fits


def test_one_call_that_does_not_fit_spoils_its_answer() -> None:
    good, bad = ("cancel_order", '{"order_id": 1, "reason": "x"}'), ("cancel_order", "{}")
    for calls, fits in (((good, good), True), ((good, bad), False), ((bad, good), False)):
        assert judge(CASES["en/order"], Reply("", "", calls, "tool_calls")).schema is fits


@pytest.mark.parametrize("language", ["en", "zh", "ja", "ko", "ru", "de", "fr", "es", "pt", "ar"])
def test_every_language_is_told_from_the_others(language: str) -> None:
    texts = {
        case.id.split("/")[0]: str(case.messages[0]["content"]) for case in CASES.values() if case.id.endswith("/tell")
    }
    assert is_language(texts[language], language)
    assert not any(is_language(texts[language], other) for other in texts if other != language)
    assert not is_language("1 + 2 = 3", language)


@pytest.mark.parametrize(
    ("content", "reasoning", "thought", "broken", "only"),
    [
        ("<think>a</think>b", "", True, False, False),
        ("<think>a</think>", "", True, False, True),
        ("b", "a", True, False, False),
        ("b", "", False, False, False),
        ("a</think>b", "", False, True, False),
        ("<think>a", "", False, True, False),
        ("b<invoke name='x'>", "", False, True, False),
    ],
)
def test_thinking_and_its_tags(content: str, reasoning: str, thought: bool, broken: bool, only: bool) -> None:
    found = judge(Case("x", ()), Reply(content, reasoning, (), "stop"))
    assert (found.thought, found.broken_tags, found.only_reasoning) == (thought, broken, only)


def test_names_have_to_come_in_order() -> None:
    assert in_order("order_id, reason, notify", ("order_id", "reason", "notify"))
    assert not in_order("notify, order_id, reason", ("order_id", "reason", "notify"))
    assert not in_order("order_id", ("order_id", "reason"))


def test_intervals_are_wilsons() -> None:
    from scipy.stats import binomtest

    for hits, total in ((0, 5), (5, 5), (3, 10), (98, 100)):
        ends = binomtest(hits, total).proportion_ci(method="wilson")
        assert interval(hits, total) == pytest.approx((ends.low, ends.high), abs=1e-6)


def test_nothing_judged_is_no_rate() -> None:
    assert rates([None])["match"] == {"rate": None, "hits": 0, "of": 0, "ci95": None}
    assert missed(rates([])) == []
    assert compare({}, {})["trigger_similarity"] is None


@pytest.mark.parametrize(
    ("text", "said_so"),
    [
        ("[", "is not YAML"),
        ("a: 1", "languages and tools"),
        ("languages: {xx: {weather: a}}\ntools: []", "languages/xx: expected the texts"),
        ("languages: {}\ntools: [3]", "expected function"),
        ("languages: {}\ntools: [{function: {name: a, parameters: {type: 3}}}]", "expected a JSON Schema"),
        ("languages: {}\ntools: []\nscenarios: [3]", "expected ask and tokens"),
    ],
)
def test_prompts_that_are_none_are_one_line(text: str, said_so: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(InputError, match=said_so):
        read_prompts(tmp_path / "p.yaml")


def test_the_command_prints_a_table_and_fails_its_gate() -> None:
    with ChatServer(only_thinks) as server:
        command = [sys.executable, "-m", "mmquant", "verify", server.url, "--language", "en", "--gate"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4
    assert "only_reasoning" in done.stdout
    assert "expected at most 0" in done.stderr


def test_what_vllm_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program beside this Python comes first; the context is the model's where that is less."""
    folder, beside = demo_folder(), tmp_path / "bin"
    beside.mkdir()
    program = beside / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    words = verify_engine._command(folder, "vllm", 7, None, ("enforce_eager=true", "gpu-memory-utilization=0.5"))
    assert words[:4] == [str(program), "serve", str(folder), "--enable-auto-tool-choice"]
    assert {"--tool-call-parser", "minimax_m2", "--enforce-eager", "--gpu-memory-utilization=0.5"} <= {*words}
    assert words[-6:] == ["--max-model-len", "2048", "--host", "127.0.0.1", "--port", "7"]
    assert "1024" in verify_engine._command(folder, "vllm", 7, 1024, ())
    for context, given, complaint in (
        (4096, (), "--model-context 4096: the model has 2048"),
        (None, ("port=8000",), "--engine-arg port: mmquant sets it, expected it left out"),
        (None, ("max_model_len=64",), "--engine-arg max_model_len: mmquant sets it, expected --model-context"),
    ):
        with pytest.raises(InputError, match=complaint):
            verify_engine._command(folder, "vllm", 7, context, given)
    with pytest.raises(InputError, match="--engine-arg: llama"):
        verify_engine._command(folder, "llama.cpp", 7, None, ("a=1",))


def test_options_of_a_server_that_is_not_started_are_refused() -> None:
    for option in ("--engine-arg=a=1", "--model-context=64"):
        done = CliRunner().invoke(cli, ["verify", "http://127.0.0.1:1", option])
        assert "expected --model and --engine beside it" in str(done.exception)


def test_settings_of_the_engine_reach_it_and_its_key_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_USE_FLASHINFER_SAMPLER", "NCCL_P2P_DISABLE", "VLLM_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    assert {"VLLM_USE_FLASHINFER_SAMPLER", "NCCL_P2P_DISABLE"} == {
        k for k, v in verify_engine._settings().items() if v == "x"
    }


PARENT = """import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups")
def test_what_a_server_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parent(model: Path, engine: str, port: int, *_: object) -> list[str]:
        return [sys.executable, "-c", PARENT, str(port), str(tmp_path / "pid")]

    monkeypatch.setattr(verify_engine, "_command", parent)
    with serving(tmp_path, "vllm"):
        child = int((tmp_path / "pid").read_text())
        os.kill(child, 0)
    for _ in range(1000):  # its parent is gone: init, or whoever adopts, takes some time to bury it
        if Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
            time.sleep(0.01)
        else:
            break
    else:
        pytest.fail("the server's own child goes on")


VALIDATION = """(APIServer pid=7) INFO 11-29 21:00:00 [utils.py:1] starting
(APIServer pid=7) Traceback (most recent call last):
(APIServer pid=7) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=7)   Value error, max_model_len (9) is greater than 8 [type=value_error, input_value=ArgsKwargs]
(APIServer pid=7)     For further information visit https://errors.pydantic.dev/2.14/v/value_error
"""
CORE = """(EngineCore pid=8) ERROR 11-29 21:00:00 [core.py:9] EngineCore failed to start.
(EngineCore pid=8) ERROR 11-29 21:00:00 [core.py:9] Traceback (most recent call last):
(EngineCore pid=8) ERROR 11-29 21:00:00 [core.py:9] ValueError: Free memory on device (1/8 GiB) is less than desired
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            VALIDATION,
            "ValidationError: 1 validation error for ModelConfig   Value error, max_model_len (9) is greater than 8",
        ),
        (CORE, "ValueError: Free memory on device (1/8 GiB) is less than desired"),
        (
            "usage: vllm\nvllm serve: error: unrecognized arguments: --foo\n",
            "vllm serve: error: unrecognized arguments: --foo",
        ),
        ("", "without a word"),
    ],
)
def test_the_reason_in_a_log(log: str, reason: str) -> None:
    assert reason in verify_engine._reason(log.encode())
