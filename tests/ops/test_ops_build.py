"""The library: built into a cache, by several processes at once, again when stale; and by setup.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.ops.cpu import build, library

ROOT = Path(build.__file__).parents[3]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

BUILD_SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("build", sys.argv[1])
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.build_cached())
assert "torch" not in sys.modules
"""


@pytest.mark.slow
@needs_compiler
def test_two_processes_build_at_once_and_a_stale_library_is_replaced(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = os.environ | {"MMTRAIN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BUILD_SCRIPT, build.__file__]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(paths) == 1
    built = Path(paths.pop())
    assert sorted(p.suffix for p in built.parent.iterdir()) == [".lock", ".so"], "leftovers of the build"
    assert library.KernelLibrary(built, build.source_hash()).isa

    # An installed library from other sources: not used, and the report says why.
    source = tmp_path / "stale.cpp"
    source.write_text(
        'extern "C" { const char *mmtrain_source_hash() { return "0123"; } const char *mmtrain_isa() { return ""; } }'
    )
    stale = tmp_path / "_kernels.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(stale)], check=True, timeout=60)
    monkeypatch.setattr(build, "INSTALLED", stale)
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "cache"))
    result = library.find_library()
    assert result.library is not None
    assert result.library.path == built
    assert result.how == "built on first use"
    assert "0123" in result.reason


@needs_compiler
def test_damaged_cache_is_rebuilt(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # one instruction set, and nothing optimised: a second of compilation in place of ten
    monkeypatch.setattr(build, "is_x86", lambda: False)
    monkeypatch.setattr(build, "COMMON_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build.COMMON_FLAGS))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "missing.so")
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path))
    (tmp_path / f"kernels-{build.source_hash()}.so").write_bytes(b"half a file")
    result = library.find_library()
    assert result.library is not None
    assert result.library.isa


def test_hash_follows_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = build.source_hash()
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    monkeypatch.setattr(build, "SOURCES", copy)
    assert build.source_hash() == before
    with (copy / "vec.h").open("a") as file:
        file.write("// changed\n")
    assert build.source_hash() != before


@needs_compiler
def test_failed_compilation_shows_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, copy)
    (copy / "kernels.cpp").write_text("")
    (copy / "dispatch.cpp").write_text("#error deliberate\n")
    monkeypatch.setattr(build, "SOURCES", copy)
    with pytest.raises(build.BuildError, match="deliberate"):
        build.compile_library(tmp_path / "out.so")
    assert not (tmp_path / "out.so").exists()


def test_unwritable_cache_is_a_build_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", sys.executable)  # exists; never gets to run
    with pytest.raises(build.BuildError, match="cannot write"):
        build.build_cached()


def run_setup(tmp_path: Path, compiler: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"CXX": compiler}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from a source tree")
def test_setup_builds_the_library_or_warns(tmp_path: Path) -> None:
    failed = run_setup(tmp_path, "/no/such/compiler")
    assert failed.returncode == 0, failed.stderr
    assert "/no/such/compiler" in failed.stderr + failed.stdout
    assert not list(tmp_path.rglob("*.so"))
    if shutil.which("g++"):
        done = run_setup(tmp_path, "g++")
        assert done.returncode == 0, done.stderr
        found = tmp_path / "lib" / "mmtrain" / "ops" / "cpu" / build.LIBRARY_NAME
        assert library.KernelLibrary(found, build.source_hash()).isa
