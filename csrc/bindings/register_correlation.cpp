#include "bindings.hpp"
#include "mudsc/correlation.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {
namespace {

// Reads (members, starts or None, scale or None), or None, and the number of samples along an axis.
SampleOrder order_of(const py::object& order, std::int64_t& samples) {
  if (order.is_none()) return {nullptr, nullptr, nullptr};
  const auto parts = order.cast<py::tuple>();
  const TensorView members(parts[0], "members");
  SampleOrder result{members.contiguous<std::int32_t>({-1}), nullptr, nullptr};
  samples = members.shape[0];
  if (py::object(parts[1]).is_none()) return result;
  const TensorView starts(parts[1], "starts");
  result.starts = starts.contiguous<std::int32_t>({-1});
  samples = starts.shape[0] - 1;
  result.scale = optional_contiguous<double>(parts[2], "scale", {samples});
  return result;
}

void center_features(const py::object& features, const py::object& outer_order, const py::object& inner_order,
                     const py::object& centered, const py::object& mean, const py::object& squares, int isa,
                     int threads) {
  const TensorView source(features, "features");
  source.expect_float();
  source.expect_shape({-1, -1, -1});
  CenterProblem problem{};
  problem.dtype = source.scalar_type();
  problem.features = source.data;
  problem.outer = source.shape[0];
  problem.units = source.shape[1];
  problem.inner = source.shape[2];
  problem.outer_stride = source.strides[0];
  problem.unit_stride = source.strides[1];
  problem.inner_stride = source.strides[2];
  problem.outer_order = order_of(outer_order, problem.outer);
  problem.inner_order = order_of(inner_order, problem.inner);
  const std::int64_t samples = problem.outer * problem.inner;
  const TensorView target(centered, "centered");
  target.expect_float();
  target.expect_shape({problem.units, samples});
  problem.unit_major = target.is_contiguous();
  if (!problem.unit_major && (target.strides[0] != 1 || target.strides[1] != problem.units)) {
    throw py::value_error("centered must be contiguous, or the transpose of a contiguous tensor");
  }
  problem.centered_dtype = target.scalar_type();
  problem.centered = target.data;
  problem.mean = TensorView(mean, "mean").contiguous<double>({problem.units});
  problem.squares = TensorView(squares, "squares").contiguous<double>({problem.units});
  problem.threads = threads;
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), center_features, problem);
}

void accumulate_comoment(const py::object& comoment, const py::object& product, const py::object& row_shift,
                         const py::object& column_shift, int isa, int threads) {
  const TensorView sums(comoment, "comoment");
  sums.expect_shape({-1, -1});
  const std::int64_t rows = sums.shape[0], units = sums.shape[1];
  const TensorView added(product, "product");
  added.expect_float();
  added.expect_shape({rows, units});
  added.expect_contiguous();
  const AccumulateProblem problem{added.scalar_type(),
                                  added.data,
                                  TensorView(row_shift, "row_shift").contiguous<double>({rows}),
                                  TensorView(column_shift, "column_shift").contiguous<double>({units}),
                                  rows,
                                  units,
                                  sums.contiguous<double>({rows, units}),
                                  threads};
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), accumulate_comoment, problem);
}

// One block of a matrix: rows of adjacent entries.
void expect_block(const TensorView& block, std::int64_t units) {
  block.expect_float();
  block.expect_shape({units, units});
  block.expect_adjacent();
}

void correlate(const py::object& comoment, const py::object& row_deviation, const py::object& column_deviation,
               double count, double eps, const py::object& out, const py::object& mirror, const py::object& other,
               double balance, int isa, int threads) {
  const TensorView sums(comoment, "comoment");
  sums.expect_shape({-1, -1});
  CorrelateProblem problem{};
  problem.units = sums.shape[0];
  problem.comoment = sums.contiguous<double>({problem.units, problem.units});
  problem.row_deviation = TensorView(row_deviation, "row_deviation").contiguous<double>({problem.units});
  problem.column_deviation = TensorView(column_deviation, "column_deviation").contiguous<double>({problem.units});
  problem.count = count;
  problem.eps = eps;
  const TensorView result(out, "out");
  expect_block(result, problem.units);
  problem.dtype = result.scalar_type();
  problem.out = result.data;
  problem.row_stride = result.strides[0];
  if (!mirror.is_none()) {
    const TensorView mirrored(mirror, "mirror");
    expect_block(mirrored, problem.units);
    mirrored.expect_type(result.type);
    if (mirrored.strides[0] != problem.row_stride) throw py::value_error("mirror must have the row stride of out");
    problem.mirror = mirrored.data;
  }
  if (!other.is_none()) {
    const TensorView beside(other, "other");
    expect_block(beside, problem.units);
    beside.expect_type(result.type);
    problem.other = beside.data;
    problem.other_stride = beside.strides[0];
  }
  problem.balance = balance;
  problem.threads = threads;
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), correlate, problem);
}

}  // namespace

void register_correlation(py::module_& module) {
  module.def("center_features", &center_features, py::arg("features"), py::arg("outer_order"), py::arg("inner_order"),
             py::arg("centered"), py::arg("mean"), py::arg("squares"), py::arg("isa"), py::arg("threads"));
  module.def("accumulate_comoment", &accumulate_comoment, py::arg("comoment"), py::arg("product"), py::arg("row_shift"),
             py::arg("column_shift"), py::arg("isa"), py::arg("threads"));
  module.def("correlate", &correlate, py::arg("comoment"), py::arg("row_deviation"), py::arg("column_deviation"),
             py::arg("count"), py::arg("eps"), py::arg("out"), py::arg("mirror"), py::arg("other"), py::arg("balance"),
             py::arg("isa"), py::arg("threads"));
}

}  // namespace mudsc::bindings
