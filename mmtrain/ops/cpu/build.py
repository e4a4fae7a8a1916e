"""Compile the C++ kernels into one shared library: at install time (setup.py) or on first use.

Imports neither torch nor the rest of mmtrain: setup.py loads this file by its path.

The kernel source is compiled once per instruction set (AVX-512, AVX2, baseline) and the library picks one at run
time, so that a library built on one x86-64 machine serves all of them. The library carries the hash of the sources and
flags it was made from: one that does not match the sources beside it is stale and is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).with_name("csrc")
LIBRARY_NAME = "_kernels.so"
INSTALLED = Path(__file__).with_name(LIBRARY_NAME)
TIMEOUT_S = 300

# No -ffast-math: a NaN that goes in must come out. The two -fno-* change no result.
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fschedule-insns",  # with the next one, GCC fills the waits between dependent exponentials better
    "-fsched-pressure",
)
CURE = "install a C++ compiler with OpenMP (for example `apt-get install g++`), or name one in CXX"


class BuildError(RuntimeError):
    """The library could not be built; the message says why."""


class Target(NamedTuple):
    """One compilation of the kernels: instruction set, floats a vector, and the flags for it."""

    isa: str
    lanes: int
    flags: tuple[str, ...]


def is_x86() -> bool:
    return platform.machine().lower() in {"x86_64", "amd64"}


def targets() -> list[Target]:
    """The instruction sets to compile for on this machine."""
    baseline = Target("baseline", 4, ())
    if not is_x86():
        return [baseline]
    avx512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512")
    return [Target("avx512", 16, avx512), Target("avx2", 8, ("-mavx2", "-mfma")), baseline]


def source_hash() -> str:
    """Hash of every source file, the flags and the architecture (16 hexadecimal digits)."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, targets(), platform.machine(), sys.platform)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """The C++ compiler as a command: ``CXX`` if set, else the first of g++, clang++, c++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").strip()
    if named:
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise BuildError(f"the compiler named by CXX ({named}) was not found")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (looked for CXX, g++, clang++, c++)")


def _run_all(commands: list[list[str]]) -> None:
    """Run compiler commands side by side; raise BuildError with the first failing one's output."""
    running: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
            )
        for command, process in zip(commands, running, strict=True):
            output, _ = process.communicate(timeout=TIMEOUT_S)
            if process.returncode:
                lines = [line for line in output.splitlines() if line.strip()][:20]
                raise BuildError("\n".join([f"{shlex.join(command)} failed with status {process.returncode}", *lines]))
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler took longer than {TIMEOUT_S} s") from None
    except OSError as error:
        raise BuildError(f"the compiler could not be started: {error}") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


def compile_library(output: Path) -> Path:
    """Compile the kernels into ``output``, which appears complete or not at all. Takes a few seconds.

    Raises:
        BuildError: no compiler, it failed, or ``output`` cannot be written.
    """
    compiler = find_compiler()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".build-", dir=output.parent) as folder:
            work = Path(folder)
            commands, objects = [], []
            for target in targets():
                objects.append(str(work / f"{target.isa}.o"))
                defines = [f"-DMMT_ISA={target.isa}", f"-DMMT_LANES={target.lanes}"]
                source = [str(SOURCES / "kernels.cpp"), "-o", objects[-1]]
                commands.append([*compiler, *COMMON_FLAGS, *target.flags, *defines, "-w", "-c", *source])
            objects.append(str(work / "dispatch.o"))
            defines = [f'-DMMT_SOURCE_HASH="{source_hash()}"', *(["-DMMT_X86"] if is_x86() else [])]
            source = [str(SOURCES / "dispatch.cpp"), "-o", objects[-1]]
            commands.append([*compiler, *COMMON_FLAGS, *defines, "-c", *source])
            _run_all(commands)
            library = work / LIBRARY_NAME
            _run_all([[*compiler, "-shared", "-fopenmp", *objects, "-o", str(library)]])
            os.replace(library, output)
    except OSError as error:
        raise BuildError(f"cannot write {output}: {error}") from error
    return output


def cache_folder() -> Path:
    """``$MMTRAIN_CACHE``, else ``~/.cache/mmtrain``."""
    named = os.environ.get("MMTRAIN_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mmtrain"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process of a machine build while the others wait; without locks (some network file systems) all build."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("w"))
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also by a process that dies
        yield


def build_cached() -> Path:
    """The library in the cache folder, built now if it is not there.

    Its name carries the hash of the sources, so versions live side by side and any number of processes may call this.

    Raises:
        BuildError: see :func:`compile_library`.
    """
    path = cache_folder() / f"kernels-{source_hash()}.so"
    if path.exists():
        return path
    with _lock(path.with_suffix(".lock")):
        return path if path.exists() else compile_library(path)
