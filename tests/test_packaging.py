"""Wheel and sdist hold exactly the checkout's modules and data, and work elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mmquant

pytestmark = pytest.mark.checkout
ROOT = Path(__file__).parent.parent
PACKAGES = ("commands", "runs", "calibration", "convert", "quantize")
INSTALLED = {"mmquant": "mmquant", **{name: f"mmquant/{name}" for name in PACKAGES}}


def test_the_version_is_the_same_everywhere() -> None:
    """`mmquant/__init__.py` says it to the build; what people cite and read repeats it."""
    assert f"\nversion: {mmquant.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## .*{re.escape(mmquant.__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.slow
def test_the_pins_are_to_be_had_without_this_machines_own_wheels(tmp_path: Path) -> None:
    """torch's usual wheel asks for one version of triton, which its CPU build, that may be installed here, does not."""
    settings = {name: value for name, value in os.environ.items() if name == "PIP_CERT" or not name.startswith("PIP_")}
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    pins = ["-c", "constraints.txt", "--build-constraint", "constraints.txt", "--group", "dev", "."]
    report = tmp_path / "report.json"
    done = subprocess.run(
        [*pip, "--report", str(report), *pins],
        cwd=ROOT,
        env={**settings, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {one["metadata"]["name"].lower() for one in json.loads(report.read_text())["install"]}
    pinned = set(re.findall(r"^([^#=]+)==", (ROOT / "constraints.txt").read_text().lower(), re.M))
    assert {name for name in found - pinned if not re.match("nvidia-|cuda-", name)} == {"mmquant"}


def expected_members() -> set[str]:
    """Paths inside the wheel of every tracked or new module, and of every data file."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *INSTALLED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [path for path in listed.stdout.splitlines() if (ROOT / path).is_file()]
    return {path.replace(path.split("/")[0], INSTALLED[path.split("/")[0]], 1) for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `python -m build` does it: an sdist first, the wheel from the unpacked sdist, so both must be whole."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    subprocess.run([*build, "--sdist", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([*build, "--wheel", "--outdir", str(folder), str(source)], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in a folder of its own, away from the checkout; dependencies come from this environment."""
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_wheel_holds_the_checkout_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected_members()


@pytest.mark.slow
def test_the_licence_travels(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert "Apache License" in archive.read(licence).decode()


@pytest.mark.slow
def test_it_runs_beside_a_users_own_files(installed: Path, tmp_path: Path) -> None:
    """People keep a convert.py and a quantize/ of their own where they work; ours must not be taken for theirs."""
    (tmp_path / "convert.py").write_text("raise SystemExit('the wrong convert')\n")
    (tmp_path / "quantize").mkdir()
    (tmp_path / "quantize" / "__init__.py").write_text("raise SystemExit('the wrong quantize')\n")
    where = run(installed, tmp_path, "-c", "import mmquant.convert.files.atomic as f; print(f.__file__)")
    assert where.stdout.strip() == str(installed / "mmquant" / "convert" / "files" / "atomic.py"), where.stderr
    shown = run(installed, tmp_path, "-m", "mmquant", "inspect", "demo")
    assert shown.returncode == 0, shown.stderr
    written = run(installed, tmp_path, "-m", "mmquant", "fp8", "--model", "demo", "--out", "m27-fp8")
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "m27-fp8" / "config.json").is_file()
