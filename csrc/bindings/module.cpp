#include <exception>

#include "bindings.hpp"
#include "mudsc/build_info.hpp"

#if defined(__clang__)
#define MUDSC_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define MUDSC_COMPILER "gcc " __VERSION__
#else
#define MUDSC_COMPILER "unknown"
#endif

PYBIND11_MODULE(_core, module) {
  namespace py = pybind11;
  using namespace mudsc;

  module.doc() = "Compiled kernels of mudsc_fast; see mudsc_fast.ops for the functions to call.";
  module.attr("__version__") = build_info::kVersion;
  module.attr("compiler") = MUDSC_COMPILER;
  module.attr("cuda_problem") = build_info::kCudaProblem;  // why there is no module of CUDA kernels; "" if there is
  // Names in the order of the Isa enumeration: an index is a level.
#if MUDSC_X86_64
  module.attr("isa_levels") = py::make_tuple("baseline", "avx2", "avx512");
#else
  module.attr("isa_levels") = py::make_tuple("baseline");
#endif
  module.attr("supported_isa") = static_cast<int>(supported_isa());

  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const OutOfMemory&) {
      PyErr_NoMemory();
    }
  });

  bindings::register_assignment(module);
  bindings::register_correlation(module);
  bindings::register_permute(module);
  bindings::register_zip(module);
}
