"""The wheel is whole: built from a copy of the tree, installed elsewhere, it works without a checkout or a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

_SOURCES = ("mmtrain", "configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def run(*command: object, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copyfile(ROOT / name, tree / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, tree, folder=tree)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment that holds the wheel, and sees the packages of the running one but not its mmtrain."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # of a folder named in a .pth file, Python reads no .pth files: an editable installation there has no effect
    (packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_wheel_holds_what_is_not_python(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("py.typed", "configs/vim2_digits.yaml", "configs/base/vision.yaml", "report/report.html.jinja"):
        assert f"mmtrain/{name}" in names
    assert {"mmtrain/ops/cpu/csrc/kernels.cpp", "mmtrain/ops/triton/launch_table.json"} <= names
    if shutil.which(os.environ.get("CXX", "g++")):
        assert "mmtrain/ops/cpu/_kernels.so" in names


def test_the_installed_command_needs_no_checkout(installed: Path, tmp_path: Path) -> None:
    mmtrain = installed / "bin" / "mmtrain"
    where = run(installed / "bin" / "python", "-c", "import mmtrain; print(mmtrain.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    assert run(mmtrain, "--version", folder=tmp_path).startswith("mmtrain ")
    listed = run(mmtrain, "configs", folder=tmp_path)
    assert str(installed) in listed
    assert "ablations/tsm2_mlp_etth1" in listed
    assert "name: vim2_digits" in run(mmtrain, "train", "--config", "vim2_digits", "--print-config", folder=tmp_path)
    job = run(mmtrain, "submit", "--config", "vim2_base_in1k", "--nodes", "4", "--dry-run", folder=tmp_path)
    assert "#SBATCH --nodes=4" in job
    assert "recommended strategy" in job
    assert list(tmp_path.iterdir()) == []
