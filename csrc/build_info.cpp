// How this installation was built, for `mmicl env`. Links neither torch nor the kernels, so that it can
// be read when they cannot be loaded. No date, no path: the same inputs give the same binary.

#include <pybind11/pybind11.h>

#if defined(__clang__)
constexpr const char* kCompiler = "clang";
#else
constexpr const char* kCompiler = "gcc";
#endif

#if defined(__x86_64__)
#define MMICL_ISAS "baseline", "avx2", "avx512"
#else
#define MMICL_ISAS "baseline"
#endif

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How the C++ kernels were built.";
  m.attr("compiler") = kCompiler;
  m.attr("compiler_version") = __VERSION__;
  m.attr("flags") = MMICL_FLAGS;
  m.attr("torch_version") = MMICL_TORCH_VERSION;
  m.attr("isas") = pybind11::make_tuple(MMICL_ISAS);
}
