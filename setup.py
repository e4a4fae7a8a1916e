"""Compile the C++ kernels and package ``configs/`` at installation. Everything else is declared in pyproject.toml.

The installation succeeds without a working compiler. mmtrain then tries to compile the kernels at first use; if that
fails too, it warns and runs without them (see ``mmtrain doctor``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def load_builder() -> ModuleType:
    """Load mmtrain/ops/cpu/build.py by its path, because importing the package requires torch."""
    spec = importlib.util.spec_from_file_location(
        "mmtrain_build", Path(__file__).parent / "mmtrain" / "ops" / "cpu" / "build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = load_builder()


class BuildPython(build_py):
    """Package ``configs/`` as ``mmtrain/configs``. An editable installation reads it from the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", str(Path(self.build_lib, "mmtrain", "configs")))


class BuildKernels(build_ext):
    """Compile mmtrain/ops/cpu/_kernels.so. Its name has no Python version, because it does not use Python's API."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / builder.LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            builder.compile_library(output)
        except builder.BuildError as error:
            self.warn(
                f"the C++ kernels were not compiled: {error}\nmmtrain will try again at first use. To fix this,"
                f" {builder.CURE}"
            )


sources = sorted(f"mmtrain/ops/cpu/csrc/{path.name}" for path in builder.SOURCES.iterdir())
setup(
    ext_modules=[Extension("mmtrain.ops.cpu._kernels", sources=sources, optional=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
