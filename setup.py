"""Builds the C++ kernels where it can, and installs as pure Python, saying why, where it cannot.

Beside them it builds the CUDA kernels, where there is nvcc: one more library that only a CUDA torch loads.

torch is not a build requirement: an isolated build has none and gives pure Python. `pip install -v
--no-build-isolation -e .` compiles against the environment's torch and shows what is printed here.
MMICL_REQUIRE_EXTENSION=1 turns falling back into an error.
"""

import os
import shutil
import subprocess
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


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def build_cuda(library, torch):
    """csrc/cuda as ``library``; where that cannot be, why not."""
    library.unlink(missing_ok=True)  # from an older source, it would still be loaded
    nvcc = find_nvcc()
    if nvcc is None:
        print("mmicl-kernels: no CUDA kernels, because nvcc was not found", flush=True)
        return
    folder = Path(torch.__file__).parent
    includes = [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}"]
    # torch's own libraries bring those of CUDA along, which a CPU torch lacks
    links = [f"-L{folder / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    options = ["--options-file", "csrc/cuda/nvcc_options.txt", *includes, *links]
    library.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([nvcc, *options, *files("csrc/cuda/*.cu"), "-o", library], cwd=ROOT)
    if done.returncode:
        library.unlink(missing_ok=True)
        print(f"mmicl-kernels: no CUDA kernels, because {nvcc} failed with {done.returncode}", flush=True)


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
            build_cuda(libraries[0].with_name("_C_cuda.abi3.so"), torch)

    ext_modules = extensions(torch, cpp_extension, pybind11)
    return {"ext_modules": ext_modules, "cmdclass": {"build_ext": BuildExtension}}


setup(**build_arguments())
