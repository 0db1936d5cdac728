"""Writes code.txt and docs.txt of both sets from a CPython 3.11 standard library (PSF licence).

python3.11 python_text.py OUT

The modules are those that the demo model was not trained on, so both sets are unseen by it.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

EVALUATION_MODULES = """
calendar.py ctypes/test/test_anon.py ctypes/test/test_numbers.py ctypes/test/test_objects.py curses/ascii.py
distutils/command/bdist_rpm.py distutils/command/register.py distutils/tests/test_bdist_rpm.py
distutils/tests/test_dir_util.py email/_parseaddr.py encodings/cp424.py encodings/cp857.py
encodings/hex_codec.py encodings/iso8859_2.py encodings/mbcs.py encodings/rot_13.py idlelib/zzdummy.py
importlib/__init__.py importlib/abc.py linecache.py multiprocessing/popen_spawn_posix.py test/datetimetester.py
test/reperf.py test/support/hashlib_helper.py test/test_asyncgen.py test/test_asyncio/test_windows_events.py
test/test_augassign.py test/test_binascii.py test/test_buffer.py test/test_cmd_line_script.py test/test_copy.py
test/test_email/test_pickleable.py test/test_email/test_policy.py
test/test_importlib/source/test_case_sensitivity.py test/test_pkg.py test/test_stat.py test/test_support.py
test/test_termios.py test/test_timeit.py test/test_urlparse.py tkinter/test/test_tkinter/test_simpledialog.py
tkinter/tix.py tracemalloc.py
"""
CALIBRATION_MODULES = """
_aix_support.py codeop.py ctypes/macholib/framework.py ctypes/test/test_slicing.py distutils/msvc9compiler.py
email/mime/text.py encodings/euc_jp.py encodings/gbk.py encodings/shift_jis_2004.py encodings/undefined.py
encodings/unicode_escape.py encodings/utf_16_be.py idlelib/editor.py imaplib.py lib2to3/tests/support.py
pprint.py statistics.py test/crashers/gc_inspection.py test/mock_socket.py test/sample_doctest.py
test/test__osx_support.py test/test_codeop.py test/test_future_stmt/test_future_single_import.py test/test_gc.py
test/test_gdb/test_cfunction_full.py test/test_hash.py test/test_http_cookies.py
test/test_importlib/import_/test___package__.py test/test_importlib/test_metadata_api.py
test/test_json/test_pass3.py test/test_long.py test/test_os.py test/test_urllib2.py test/test_uuid.py timeit.py
tkinter/test/widget_tests.py unittest/loader.py unittest/test/testmock/__main__.py wsgiref/types.py
xml/sax/handler.py
"""
# A topic that quotes another one stays on the same side.
EVALUATION_TOPICS = "string-methods typesmapping typesseq typesseq-mutable debugger execmodel naming"
CALIBRATION_TOPICS = "specialnames compound formatstrings assignment types import strings calls yield"


def code(modules: str, each: int) -> str:
    """The first `each` characters of every module, whole lines."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [(library / name).read_text("utf-8", errors="ignore") for name in modules.split()]
    return "\n\n".join(text[:each].rsplit("\n", 1)[0] + "\n" for text in texts)


def main() -> None:
    """The command line."""
    out = Path(sys.argv[1])
    for folder, modules, each, names in (
        ("evaluation", EVALUATION_MODULES, 4000, EVALUATION_TOPICS),
        ("calibration", CALIBRATION_MODULES, 12000, CALIBRATION_TOPICS),
    ):
        (out / folder).mkdir(parents=True, exist_ok=True)
        (out / folder / "code.txt").write_text(code(modules, each), "utf-8")
        docs = "\n\n".join(topics[name].strip() for name in names.split())
        (out / folder / "docs.txt").write_text(docs + "\n", "utf-8")


if __name__ == "__main__":
    main()
