#include <algorithm>

#include "cuda_bindings.hpp"
#include "mudsc/correlation_cuda.hpp"

namespace mudsc::bindings {
namespace {

// How kernels see the samples of features: [outer, units, inner].
struct Samples {
  std::int64_t outer, units, inner;
};

// A model's features: a tuple of a tensor [outer, units, inner] of any strides, and None or [outer] int32, the places
// of the outer axis to take. Samples at equal distances may be seen as one run, [1, units, all].
struct Features {
  Features(py::handle pair, const Samples& samples, float* shift, const cuda::Stream& stream) {
    const auto [features, index] = py::reinterpret_borrow<py::tuple>(pair).cast<std::pair<py::object, py::object>>();
    const TensorView tensor(features, "features", memory_of(stream));
    tensor.expect_float();
    tensor.expect_shape({-1, samples.units, -1});
    const std::int64_t outer = tensor.shape[0], inner = tensor.shape[2];
    view.values = tensor.data;
    view.outer_stride = tensor.strides[0];
    view.unit_stride = tensor.strides[1];
    view.inner_stride = inner == 1 ? tensor.strides[0] : tensor.strides[2];
    view.outer_index = optional_entries_of<const std::int32_t>(index, "outer_index", {samples.outer}, stream);
    view.shift = shift;
    type = tensor.scalar_type();
    const bool as_it_is = samples.inner == inner && (view.outer_index != nullptr || samples.outer == outer);
    const bool one_run = samples.outer == 1 && samples.inner == outer * inner &&
                         (inner == 1 || outer == 1 || tensor.strides[0] == inner * tensor.strides[2]);
    if (!as_it_is && !one_run) throw py::value_error("features must have the samples that outer and inner say");
  }

  cuda::FeatureView view{};
  ScalarType type{};
};

void correlation_shift(const py::list& features, std::int64_t outer, std::int64_t inner, py::handle shifts, int device,
                       std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const std::int64_t models = static_cast<std::int64_t>(features.size());
  const TensorView all_shifts(shifts, "shifts", memory_of(stream));
  float* const shift = all_shifts.contiguous<float>({models, -1});
  const Samples samples{outer, all_shifts.shape[1], inner};
  for (std::int64_t first = 0; first < models; first += cuda::kShiftModels) {
    cuda::ShiftProblem problem{};
    problem.outer = outer;
    problem.units = samples.units;
    problem.inner = inner;
    for (std::int64_t model = first; model < std::min(models, first + cuda::kShiftModels); ++model) {
      const Features one(features[static_cast<std::size_t>(model)], samples, shift + model * samples.units, stream);
      problem.dtype = one.type;
      problem.features[problem.models++] = one.view;
    }
    const py::gil_scoped_release released;
    cuda::correlation_shift(problem, stream);
  }
}

void correlation_product(py::handle rows, py::handle row_shift, py::handle columns, py::handle column_shift,
                         std::int64_t outer, std::int64_t inner, bool symmetric, std::int64_t samples_per_part,
                         py::handle products, py::handle row_sums, py::handle column_sums, bool warpgroups, int device,
                         std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView sums(products, "products", memory_of(stream));
  sums.expect_shape({-1, -1, -1});
  const std::int64_t parts = sums.shape[0], units = sums.shape[1];
  const Samples samples{outer, units, inner};
  const Features of_rows(rows, samples, entries_of<float>(row_shift, "row_shift", {units}, stream), stream);
  const Features of_columns(columns, samples, entries_of<float>(column_shift, "column_shift", {units}, stream), stream);
  if (of_rows.type != of_columns.type) throw py::value_error("rows and columns must have one dtype");
  const cuda::ProductProblem problem{of_rows.type,
                                     of_rows.view,
                                     of_columns.view,
                                     outer,
                                     units,
                                     inner,
                                     symmetric,
                                     parts,
                                     samples_per_part,
                                     sums.contiguous<float>({parts, units, units}),
                                     optional_entries_of<double>(row_sums, "row_sums", {parts, 2, units}, stream),
                                     optional_entries_of<double>(column_sums, "column_sums", {parts, 2, units}, stream),
                                     warpgroups};
  const py::gil_scoped_release released;
  cuda::correlation_product(problem, stream);
}

void correlation_moments(py::handle sums, py::handle shifts, double count, double num_samples, py::handle mean,
                         py::handle squares, bool updates, py::handle batch, py::handle in_range, int device,
                         std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView all(sums, "sums", memory_of(stream));
  all.expect_shape({-1, -1, 2, -1});
  const std::int64_t models = all.shape[0], parts = all.shape[1], units = all.shape[3];
  const TensorView range(in_range, "in_range", memory_of(stream));
  range.expect_shape({});
  const cuda::MomentsProblem problem{all.contiguous<double>({models, parts, 2, units}),
                                     entries_of<const float>(shifts, "shifts", {models, units}, stream),
                                     models,
                                     parts,
                                     units,
                                     count,
                                     num_samples,
                                     entries_of<double>(mean, "mean", {models, units}, stream),
                                     entries_of<double>(squares, "squares", {models, units}, stream),
                                     updates,
                                     entries_of<double>(batch, "batch", {models, 3, units}, stream),
                                     static_cast<std::uint8_t*>(range.data)};
  const py::gil_scoped_release released;
  cuda::correlation_moments(problem, stream);
}

void correlation_join(py::handle products, bool symmetric, py::handle row_sums, py::handle column_sums, double count,
                      py::handle row_shifts, py::handle column_shifts, double shift_weight, double weight,
                      py::handle comoment, int device, std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView sums(products, "products", memory_of(stream));
  sums.expect_float();
  sums.expect_shape({-1, -1, -1});
  const std::int64_t parts = sums.shape[0], units = sums.shape[1];
  sums.expect_shape({parts, units, units});
  sums.expect_contiguous();
  const cuda::JoinProblem problem{sums.scalar_type(),
                                  sums.data,
                                  parts,
                                  units,
                                  symmetric,
                                  optional_entries_of<const double>(row_sums, "row_sums", {units}, stream),
                                  optional_entries_of<const double>(column_sums, "column_sums", {units}, stream),
                                  count,
                                  entries_of<const double>(row_shifts, "row_shifts", {units}, stream),
                                  entries_of<const double>(column_shifts, "column_shifts", {units}, stream),
                                  shift_weight,
                                  weight,
                                  entries_of<double>(comoment, "comoment", {units, units}, stream)};
  const py::gil_scoped_release released;
  cuda::correlation_join(problem, stream);
}

// A block of a similarity: [units, units] in one dtype, with rows of adjacent entries.
struct Block {
  Block(py::handle tensor, const char* name, std::int64_t units, const TensorView& like, const cuda::Stream& stream) {
    if (tensor.is_none()) return;
    const TensorView view(tensor, name, memory_of(stream));
    view.expect_type(like.type);
    view.expect_shape({units, units});
    view.expect_adjacent();
    data = view.data;
    row_stride = view.strides[0];
  }

  void* data = nullptr;
  std::int64_t row_stride = 0;
};

void correlation_blend(py::handle comoment, py::handle row_deviation, py::handle column_deviation, double count,
                       double eps, py::handle out, py::handle mirror, py::handle other, double balance, int device,
                       std::uintptr_t handle) {
  const cuda::Stream stream = stream_of(device, handle);
  const TensorView result(out, "out", memory_of(stream));
  result.expect_float();
  result.expect_shape({-1, -1});
  const std::int64_t units = result.shape[0];
  const Block to(out, "out", units, result, stream), mirrored(mirror, "mirror", units, result, stream),
      beside(other, "other", units, result, stream);
  if (mirrored.data != nullptr && mirrored.row_stride != to.row_stride) {
    throw py::value_error("mirror must have the strides of out");
  }
  const CorrelateProblem problem{entries_of<const double>(comoment, "comoment", {units, units}, stream),
                                 entries_of<const double>(row_deviation, "row_deviation", {units}, stream),
                                 entries_of<const double>(column_deviation, "column_deviation", {units}, stream),
                                 units,
                                 count,
                                 eps,
                                 result.scalar_type(),
                                 to.data,
                                 mirrored.data,
                                 to.row_stride,
                                 beside.data,
                                 beside.row_stride,
                                 balance,
                                 1};
  const py::gil_scoped_release released;
  cuda::correlation_blend(problem, stream);
}

}  // namespace

void register_cuda_correlation(py::module_& module) {
  module.def("correlation_tile", &cuda::correlation_tile);
  module.def("correlation_shift", &correlation_shift, py::kw_only(), py::arg("features"), py::arg("outer"),
             py::arg("inner"), py::arg("shifts"), py::arg("device"), py::arg("stream"));
  module.def("correlation_product", &correlation_product, py::kw_only(), py::arg("rows"), py::arg("row_shift"),
             py::arg("columns"), py::arg("column_shift"), py::arg("outer"), py::arg("inner"), py::arg("symmetric"),
             py::arg("samples_per_part"), py::arg("products"), py::arg("row_sums"), py::arg("column_sums"),
             py::arg("warpgroups"), py::arg("device"), py::arg("stream"));
  module.def("correlation_moments", &correlation_moments, py::kw_only(), py::arg("sums"), py::arg("shifts"),
             py::arg("count"), py::arg("num_samples"), py::arg("mean"), py::arg("squares"), py::arg("updates"),
             py::arg("batch"), py::arg("in_range"), py::arg("device"), py::arg("stream"));
  module.def("correlation_join", &correlation_join, py::kw_only(), py::arg("products"), py::arg("symmetric"),
             py::arg("row_sums"), py::arg("column_sums"), py::arg("count"), py::arg("row_shifts"),
             py::arg("column_shifts"), py::arg("shift_weight"), py::arg("weight"), py::arg("comoment"),
             py::arg("device"), py::arg("stream"));
  module.def("correlation_blend", &correlation_blend, py::kw_only(), py::arg("comoment"), py::arg("row_deviation"),
             py::arg("column_deviation"), py::arg("count"), py::arg("eps"), py::arg("out"), py::arg("mirror"),
             py::arg("other"), py::arg("balance"), py::arg("device"), py::arg("stream"));
}

}  // namespace mudsc::bindings
