"""Builds the C++ kernels where it can, and installs as pure Python, saying why, where it cannot.

torch is not a build requirement: an isolated build has none and gives pure Python. `pip install -v
--no-build-isolation -e .` compiles against the environment's torch and shows what is printed here.
MMICL_REQUIRE_EXTENSION=1 turns falling back into an error.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
TORCH_2_11 = "0x020b000000000000"  # the oldest torch whose stable ABI the binary needs


def pure_python(reason):
    if os.environ.get("MMICL_REQUIRE_EXTENSION") == "1":
        raise SystemExit(f"mmicl-kernels: MMICL_REQUIRE_EXTENSION=1, but {reason}")
    print(f"mmicl-kernels: installing as pure Python, because {reason}", flush=True)
    return {}


def files(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def extensions(torch, cpp_extension, pybind11):
    flags = [*FLAGS, f"-ffile-prefix-map={ROOT}=."]  # the same binary wherever the tree lies
    kernels = cpp_extension.CppExtension(
        "mmicl_kernels._C",
        [*files("csrc/bindings*.cpp"), *files("csrc/cpu/*.cpp")],
        depends=[*files("csrc/*.h"), *files("csrc/cpu/*.h")],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_2_11)],
        extra_compile_args=flags,
        py_limited_api=True,  # there is no Python in it at all: torch.ops.load_library loads it
    )
    texts = {"MMICL_TORCH_VERSION": torch.__version__, "MMICL_FLAGS": " ".join(FLAGS)}
    build_info = Extension(
        "mmicl_kernels._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, f'"{text}"') for name, text in texts.items()],
        extra_compile_args=flags,
        language="c++",
    )
    return [kernels, build_info]


def build_arguments():
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return pure_python(f"there is no C++ compiler: {compiler!r} was not found")
    try:
        import pybind11
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return pure_python(f"the build sees no torch or pybind11 ({error}); try --no-build-isolation")

    class BuildExtension(cpp_extension.BuildExtension):
        def run(self):
            libraries = [Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions]
            try:
                super().run()
            except Exception as error:  # compilers fail in many ways, and each leaves plain torch
                pure_python(f"compiling failed: {error}")
                self.extensions = []
                for library in libraries:  # from an older source, it would still be loaded
                    library.unlink(missing_ok=True)

    ext_modules = extensions(torch, cpp_extension, pybind11)
    return {"ext_modules": ext_modules, "cmdclass": {"build_ext": BuildExtension}}


setup(**build_arguments())
