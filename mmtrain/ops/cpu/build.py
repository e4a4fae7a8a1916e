"""Compile the C++ kernels to a shared library, at installation (setup.py) or at first use.

This module imports neither torch nor the rest of mmtrain, because setup.py loads it by its path.

The kernels are compiled for each instruction set (AVX-512, AVX2, baseline), and the library selects one at run time. So
a library compiled on one x86-64 machine runs on all of them. The library contains a hash of its sources and flags. If
the hash differs from that of the present sources, the library is stale and is compiled again.
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

# -ffast-math is not used, because NaN must propagate. The two -fno-* flags do not change results.
COMMON_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fschedule-insns",  # this and the next flag help GCC to hide the latency of dependent exponentials
    "-fsched-pressure",
)
CURE = "install a C++ compiler with OpenMP (for example `apt-get install g++`), or set CXX to one"


class BuildError(RuntimeError):
    """The library could not be compiled. The message contains the reason."""


class Target(NamedTuple):
    """One compilation of the kernels: instruction set, floats per vector, and compiler flags."""

    isa: str
    lanes: int
    flags: tuple[str, ...]


def is_x86() -> bool:
    """Return whether this machine has an x86-64 processor."""
    return platform.machine().lower() in {"x86_64", "amd64"}


def targets() -> list[Target]:
    """Return the compilations for this machine's architecture, one per instruction set."""
    baseline = Target("baseline", 4, ())
    if not is_x86():
        return [baseline]
    avx512 = ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512")
    return [Target("avx512", 16, avx512), Target("avx2", 8, ("-mavx2", "-mfma")), baseline]


def source_hash() -> str:
    """Return a hash of the source files, the flags and the architecture (16 hexadecimal digits)."""
    digest = hashlib.sha256(repr((COMMON_FLAGS, targets(), platform.machine(), sys.platform)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: ``CXX`` if set, else the first of g++, clang++, c++ on the PATH.

    Raises:
        BuildError: if no compiler is found.
    """
    named = os.environ.get("CXX", "").strip()
    if named:
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise BuildError(f"CXX={named}: this compiler was not found")
        return command
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler found (CXX is not set; g++, clang++ and c++ are not on the PATH)")


def _run_all(commands: list[list[str]]) -> None:
    """Run compiler commands in parallel.

    Raises:
        BuildError: with the output of the first command that fails.
    """
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
    """Compile the kernels to the file ``output`` and return it. This takes a few seconds.

    The library is renamed to ``output`` at the end, so an incomplete file never exists there.

    Raises:
        BuildError: if there is no compiler, if it fails, or if ``output`` cannot be written.
    """
    compiler = find_compiler()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # In the folder of the output, so that the final rename is within one file system.
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
    """Return the folder for compiled libraries: ``$MMTRAIN_CACHE`` if set, else ``~/.cache/mmtrain``."""
    named = os.environ.get("MMTRAIN_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "mmtrain"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process compile while the others wait. On file systems without locks, all of them compile."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(path.open("w"))
            fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed, also when the process dies
        yield


def build_cached() -> Path:
    """Return the library in the cache folder, compiling it if it does not exist.

    Its name contains the hash of the sources, so the folder may contain several versions. Any number of processes may
    call this at the same time.

    Raises:
        BuildError: see :func:`compile_library`.
    """
    path = cache_folder() / f"kernels-{source_hash()}.so"
    if path.exists():
        return path
    with _lock(path.with_suffix(".lock")):
        return path if path.exists() else compile_library(path)
