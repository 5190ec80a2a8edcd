#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cuda_bindings.hpp"
#include "mudsc/correlation_cuda.hpp"

namespace mudsc::bindings {
namespace {

using Strides = std::array<std::int64_t, 3>;  // of outer, unit, inner

cuda::FeatureView view_of(std::uintptr_t values, const Strides& strides, std::uintptr_t index, std::uintptr_t shift) {
  return {pointer<const void>(values),        strides[0],           strides[1], strides[2],
          pointer<const std::int32_t>(index), pointer<float>(shift)};
}

// Addresses of values and index (or 0), and strides, of each model.
using Features = std::vector<std::tuple<std::uintptr_t, Strides, std::uintptr_t>>;

void correlation_shift(int dtype, const Features& features, std::int64_t outer, std::int64_t units, std::int64_t inner,
                       std::uintptr_t shifts, int device, std::uintptr_t stream) {
  const py::gil_scoped_release released;
  for (std::size_t first = 0; first < features.size(); first += cuda::kShiftModels) {
    cuda::ShiftProblem problem{};
    problem.dtype = static_cast<ScalarType>(dtype);
    problem.outer = outer;
    problem.units = units;
    problem.inner = inner;
    for (std::size_t model = first; model < features.size() && problem.models < cuda::kShiftModels; ++model) {
      const auto& [values, strides, index] = features[model];
      float* const shift = pointer<float>(shifts) + static_cast<std::int64_t>(model) * units;
      problem.features[problem.models++] = view_of(values, strides, index, reinterpret_cast<std::uintptr_t>(shift));
    }
    cuda::correlation_shift(problem, stream_of(device, stream));
  }
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

void correlation_moments(std::uintptr_t sums, std::uintptr_t shifts, std::int64_t models, std::int64_t parts,
                         std::int64_t units, double count, double num_samples, std::uintptr_t mean,
                         std::uintptr_t squares, bool updates, std::uintptr_t batch, std::uintptr_t in_range,
                         int device, std::uintptr_t stream) {
  const cuda::MomentsProblem problem{pointer<const double>(sums),
                                     pointer<const float>(shifts),
                                     models,
                                     parts,
                                     units,
                                     count,
                                     num_samples,
                                     pointer<double>(mean),
                                     pointer<double>(squares),
                                     updates,
                                     pointer<double>(batch),
                                     pointer<std::uint8_t>(in_range)};
  const py::gil_scoped_release released;
  cuda::correlation_moments(problem, stream_of(device, stream));
}

void correlation_join(int product_dtype, std::uintptr_t products, std::int64_t parts, std::int64_t units,
                      bool symmetric, std::uintptr_t row_sums, std::uintptr_t column_sums, double count,
                      std::uintptr_t row_shifts, std::uintptr_t column_shifts, double shift_weight, double weight,
                      std::uintptr_t comoment, int device, std::uintptr_t stream) {
  const cuda::JoinProblem problem{static_cast<ScalarType>(product_dtype),
                                  pointer<const void>(products),
                                  parts,
                                  units,
                                  symmetric,
                                  pointer<const double>(row_sums),
                                  pointer<const double>(column_sums),
                                  count,
                                  pointer<const double>(row_shifts),
                                  pointer<const double>(column_shifts),
                                  shift_weight,
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
             py::arg("outer"), py::arg("units"), py::arg("inner"), py::arg("shifts"), py::arg("device"),
             py::arg("stream"));
  module.def("correlation_moments", &correlation_moments, py::kw_only(), py::arg("sums"), py::arg("shifts"),
             py::arg("models"), py::arg("parts"), py::arg("units"), py::arg("count"), py::arg("num_samples"),
             py::arg("mean"), py::arg("squares"), py::arg("updates"), py::arg("batch"), py::arg("in_range"),
             py::arg("device"), py::arg("stream"));
  module.def("correlation_product", &correlation_product, py::kw_only(), py::arg("dtype"), py::arg("rows"),
             py::arg("row_strides"), py::arg("row_index"), py::arg("row_shift"), py::arg("columns"),
             py::arg("column_strides"), py::arg("column_index"), py::arg("column_shift"), py::arg("outer"),
             py::arg("units"), py::arg("inner"), py::arg("symmetric"), py::arg("parts"), py::arg("samples_per_part"),
             py::arg("products"), py::arg("row_sums"), py::arg("column_sums"), py::arg("warpgroups"), py::arg("device"),
             py::arg("stream"));
  module.def("correlation_join", &correlation_join, py::kw_only(), py::arg("product_dtype"), py::arg("products"),
             py::arg("parts"), py::arg("units"), py::arg("symmetric"), py::arg("row_sums"), py::arg("column_sums"),
             py::arg("count"), py::arg("row_shifts"), py::arg("column_shifts"), py::arg("shift_weight"),
             py::arg("weight"), py::arg("comoment"), py::arg("device"), py::arg("stream"));
  module.def("correlation_blend", &correlation_blend, py::kw_only(), py::arg("comoment"), py::arg("row_deviation"),
             py::arg("column_deviation"), py::arg("units"), py::arg("count"), py::arg("eps"), py::arg("dtype"),
             py::arg("out"), py::arg("mirror"), py::arg("row_stride"), py::arg("other"), py::arg("other_stride"),
             py::arg("balance"), py::arg("device"), py::arg("stream"));
}

}  // namespace mudsc::bindings
