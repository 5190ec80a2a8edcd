#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "mudsc/permute.hpp"

namespace mudsc::bindings {
namespace {

// kind, address of the index, address of the scale or 0, units in, units out
using AxisArguments = std::tuple<int, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>;

AxisMap axis_map(const AxisArguments& axis) {
  return AxisMap{static_cast<UnitMapKind>(std::get<0>(axis)), pointer<const std::int64_t>(std::get<1>(axis)),
                 pointer<const double>(std::get<2>(axis)), std::get<3>(axis), std::get<4>(axis)};
}

}  // namespace

void register_permute(py::module_& module) {
  module.def(
      "permute_merge",
      [](int isa, int threads, int dtype, const std::vector<std::uintptr_t>& tensors,
         const std::vector<double>& weights, std::int64_t outer, std::int64_t middle, std::int64_t inner,
         const AxisArguments& rows, const AxisArguments& columns, std::uintptr_t out, bool out_is_new) {
        std::vector<const void*> addresses;
        for (const std::uintptr_t tensor : tensors) addresses.push_back(pointer<const void>(tensor));
        const PermuteProblem problem{static_cast<ScalarType>(dtype), static_cast<std::int64_t>(tensors.size()),
                                     addresses.data(), weights.data(), outer, middle, inner,
                                     axis_map(rows), axis_map(columns), pointer<void>(out), out_is_new, threads};
        const py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
      },
      py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("tensors"), py::arg("weights"),
      py::arg("outer"), py::arg("middle"), py::arg("inner"), py::arg("rows"), py::arg("columns"), py::arg("out"),
      py::arg("out_is_new"));
  module.def(
      "permute_in_place",
      [](int isa, int threads, int dtype, std::int64_t outer, std::int64_t middle, std::int64_t inner,
         const AxisArguments& rows, const AxisArguments& columns, std::uintptr_t out) {
        const PermuteProblem problem{static_cast<ScalarType>(dtype), 1, nullptr, nullptr, outer, middle, inner,
                                     axis_map(rows), axis_map(columns), pointer<void>(out), false, threads};
        const py::gil_scoped_release released;
        MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_in_place, problem);
      },
      py::arg("isa"), py::arg("threads"), py::arg("dtype"), py::arg("outer"), py::arg("middle"), py::arg("inner"),
      py::arg("rows"), py::arg("columns"), py::arg("out"));
}

}  // namespace mudsc::bindings
