"""Builds the CPU kernels; everything else about the package is in pyproject.toml.

Each `kernels_*.cc` is the same source compiled for one instruction set; the library picks one when it runs. Without a
working compiler the package installs all the same, and runs on `jax.numpy`.
"""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("jaxopt_llm/kernels/cpu")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni".split()
ISA_FLAGS = {
    "kernels_amx.cc": [*AVX512, "-mamx-tile", "-mamx-int8"],
    "kernels_avx512.cc": AVX512,
    "kernels_avx2.cc": "-mavx2 -mfma -mf16c".split(),
}
# Compilers that do not know the instructions leave them out: without its flags such a file has no kernels.
OPTIONAL = {"kernels_amx.cc"}
# contract=off: the compiler must not fuse a product with a sum in one copy of a loop and leave them apart in another
FLAGS = "-std=c++17 -O3 -g0 -DNDEBUG -ffp-contract=off -fno-math-errno -fvisibility-inlines-hidden -pthread".split()
FLAGS += [
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-Wno-attributes",
    "-Wno-return-type",
]  # of GCC's and XLA's own headers


class BuildKernels(build_ext):
    """Compiles each source with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        objects = []
        for source in ext.sources:
            flags = ISA_FLAGS.get(Path(source).name, [])
            try:
                objects += self.compile(ext, source, flags)
            except CompileError:
                if Path(source).name not in OPTIONAL:
                    raise
                objects += self.compile(ext, source, [])
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=["-pthread"], target_lang="c++"
        )

    def compile(self, ext: Extension, source: str, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=FLAGS + flags,
            depends=ext.depends,
        )

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # opened by ctypes, not imported: no Python ABI in its name


def kernels() -> Extension:
    jaxlib = importlib.util.find_spec("jaxlib")
    include = [str(Path(folder, "include")) for folder in jaxlib.submodule_search_locations] if jaxlib else []
    skipped = set() if X86 else set(ISA_FLAGS)
    sources = sorted(path for path in FOLDER.glob("*.cc") if path.name not in skipped)
    return Extension(
        "jaxopt_llm.kernels.cpu.libjaxopt_cpu",
        sources=[str(path) for path in sources],
        depends=[str(path) for path in sorted(FOLDER.glob("*.h"))],
        include_dirs=include,
        language="c++",
        optional=True,
    )


setup(ext_modules=[kernels()], cmdclass={"build_ext": BuildKernels})
