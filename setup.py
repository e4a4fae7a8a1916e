"""Builds the C++ kernels and packs ``configs/`` at install time. All else about the package is in pyproject.toml.

A missing or failing compiler does not fail the installation: mmtrain then builds the kernels on first use, or says
loudly that it runs without them (``mmtrain doctor``).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def load_builder() -> ModuleType:
    """mmtrain/ops/cpu/build.py by its path: importing the package would need torch."""
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
    """Pack ``configs/`` as ``mmtrain/configs``. An editable installation reads it from the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", str(Path(self.build_lib, "mmtrain", "configs")))


class BuildKernels(build_ext):
    """Compile mmtrain/ops/cpu/_kernels.so: a plain shared library, so its name carries no Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / builder.LIBRARY_NAME)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            builder.compile_library(output)
        except builder.BuildError as error:
            self.warn(
                f"the C++ kernels were not built: {error}\nmmtrain will try again on first use; cure: {builder.CURE}"
            )


sources = sorted(f"mmtrain/ops/cpu/csrc/{path.name}" for path in builder.SOURCES.iterdir())
setup(
    ext_modules=[Extension("mmtrain.ops.cpu._kernels", sources=sources, optional=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
)
