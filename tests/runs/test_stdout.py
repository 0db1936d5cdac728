"""stdout is the result's alone, whatever an engine in the same process prints, at any level and when it exits."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import atexit, json, logging, os, subprocess, sys
from mmquant.runs.evaluation.stdout import stdout_to_stderr
with stdout_to_stderr():
    print("printed")
    logging.basicConfig(stream=sys.stdout, level="INFO")
    logging.info("logged")
    os.write(1, b"written\\n")
    subprocess.run([sys.executable, "-c", "print('from a child')"])
    late = subprocess.Popen(["sh", "-c", "read x; echo late"], stdin=subprocess.PIPE)
    atexit.register(os.write, 1, b"at exit\\n")
    atexit.register(print, "at exit too")
print(json.dumps({"a": 1}))
late.communicate(b"now\\n")
logging.info("after")
"""


def test_only_the_result_is_on_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"a": 1}
    for words in ("printed", "logged", "written", "from a child", "late", "at exit", "at exit too", "after"):
        assert words in done.stderr


def test_an_error_inside_leaves_stdout_as_it_was() -> None:
    script = "from mmquant.runs.evaluation.stdout import stdout_to_stderr as s\ntry:\n    with s():\n        1 / 0\n"
    script += "except ZeroDivisionError:\n    print('out')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "out\n"
