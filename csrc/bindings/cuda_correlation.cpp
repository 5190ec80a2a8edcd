#include <pybind11/stl.h>

#include <array>

#include "cuda_bindings.hpp"
#include "mudsc/correlation_cuda.hpp"

namespace mudsc::bindings {
namespace {

using Strides = std::array<std::int64_t, 3>;  // of outer, unit, inner

cuda::FeatureView view_of(std::uintptr_t values, const Strides& strides, std::uintptr_t index, std::uintptr_t shift) {
  return {pointer<const void>(values),        strides[0],           strides[1], strides[2],
          pointer<const std::int32_t>(index), pointer<float>(shift)};
}

void correlation_shift(int dtype, std::uintptr_t features, const Strides& strides, std::uintptr_t index,
                       std::int64_t outer, std::int64_t units, std::int64_t inner, std::uintptr_t shift, int device,
                       std::uintptr_t stream) {
  const cuda::ShiftProblem problem{static_cast<ScalarType>(dtype), view_of(features, strides, index, shift), outer,
                                   units, inner};
  const py::gil_scoped_release released;
  cuda::correlation_shift(problem, stream_of(device, stream));
}

void correlation_product(int dtype, std::uintptr_t rows, const Strides& row_strides, std::uintptr_t row_index,
                         std::uintptr_t row_shift, std::uintptr_t columns, const Strides& column_strides,
                         std::uintptr_t column_index, std::uintptr_t column_shift, std::int64_t outer,
                         std::int64_t units, std::int64_t inner, bool symmetric, std::int64_t parts,
                         std::int64_t samples_per_part, std::uintptr_t products, std::uintptr_t row_sums,
                         std::uintptr_t column_sums, bool warpgroups, int device, std::uintptr_t stream) {
  const cuda::ProductProblem problem{static_cast<ScalarType>(dtype),
                                     view_of(rows, row_strides, row_index, row_shift),
                                     view_of(columns, column_strides, column_index, column_shift),
                                     outer,
                                     units,
                                     inner,
                                     symmetric,
                                     parts,
                                     samples_per_part,
                                     pointer<float>(products),
                                     pointer<double>(row_sums),
                                     pointer<double>(column_sums),
                                     warpgroups};
  const py::gil_scoped_release released;
  cuda::correlation_product(problem, stream_of(device, stream));
}

void correlation_join(int product_dtype, std::uintptr_t products, std::int64_t parts, std::int64_t units,
                      bool symmetric, std::uintptr_t rows, std::uintptr_t columns, double weight,
                      std::uintptr_t comoment, int device, std::uintptr_t stream) {
  const cuda::JoinProblem problem{static_cast<ScalarType>(product_dtype),
                                  pointer<const void>(products),
                                  parts,
                                  units,
                                  symmetric,
                                  pointer<const double>(rows),
                                  pointer<const double>(columns),
                                  weight,
                                  pointer<double>(comoment)};
  const py::gil_scoped_release released;
  cuda::correlation_join(problem, stream_of(device, stream));
}

void correlation_blend(std::uintptr_t comoment, std::uintptr_t row_deviation, std::uintptr_t column_deviation,
                       std::int64_t units, double count, double eps, int dtype, std::uintptr_t out,
                       std::uintptr_t mirror, std::int64_t row_stride, std::uintptr_t other, std::int64_t other_stride,
                       double balance, int device, std::uintptr_t stream) {
  const CorrelateProblem problem{pointer<const double>(comoment),
                                 pointer<const double>(row_deviation),
                                 pointer<const double>(column_deviation),
                                 units,
                                 count,
                                 eps,
                                 static_cast<ScalarType>(dtype),
                                 pointer<void>(out),
                                 pointer<void>(mirror),
                                 row_stride,
                                 pointer<const void>(other),
                                 other_stride,
                                 balance,
                                 1};
  const py::gil_scoped_release released;
  cuda::correlation_blend(problem, stream_of(device, stream));
}

}  // namespace

void register_cuda_correlation(py::module_& module) {
  module.def("correlation_tile", &cuda::correlation_tile);
  module.def("correlation_shift", &correlation_shift, py::kw_only(), py::arg("dtype"), py::arg("features"),
             py::arg("strides"), py::arg("index"), py::arg("outer"), py::arg("units"), py::arg("inner"),
             py::arg("shift"), py::arg("device"), py::arg("stream"));
  module.def("correlation_product", &correlation_product, py::kw_only(), py::arg("dtype"), py::arg("rows"),
             py::arg("row_strides"), py::arg("row_index"), py::arg("row_shift"), py::arg("columns"),
             py::arg("column_strides"), py::arg("column_index"), py::arg("column_shift"), py::arg("outer"),
             py::arg("units"), py::arg("inner"), py::arg("symmetric"), py::arg("parts"), py::arg("samples_per_part"),
             py::arg("products"), py::arg("row_sums"), py::arg("column_sums"), py::arg("warpgroups"), py::arg("device"),
             py::arg("stream"));
  module.def("correlation_join", &correlation_join, py::kw_only(), py::arg("product_dtype"), py::arg("products"),
             py::arg("parts"), py::arg("units"), py::arg("symmetric"), py::arg("rows"), py::arg("columns"),
             py::arg("weight"), py::arg("comoment"), py::arg("device"), py::arg("stream"));
  module.def("correlation_blend", &correlation_blend, py::kw_only(), py::arg("comoment"), py::arg("row_deviation"),
             py::arg("column_deviation"), py::arg("units"), py::arg("count"), py::arg("eps"), py::arg("dtype"),
             py::arg("out"), py::arg("mirror"), py::arg("row_stride"), py::arg("other"), py::arg("other_stride"),
             py::arg("balance"), py::arg("device"), py::arg("stream"));
}

}  // namespace mudsc::bindings
