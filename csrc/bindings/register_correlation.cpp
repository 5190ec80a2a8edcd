#include <tuple>

#include "bindings.hpp"
#include "mudsc/correlation.hpp"

namespace mudsc::bindings {
namespace {

// Addresses of members, starts and scale.
using Order = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t>;

SampleOrder order_of(const Order& order) {
  return {pointer<const std::int32_t>(std::get<0>(order)), pointer<const std::int32_t>(std::get<1>(order)),
          pointer<const double>(std::get<2>(order))};
}

void center_features(int isa, int threads, int dtype, std::uintptr_t features, std::int64_t outer, std::int64_t units,
                     std::int64_t inner, std::int64_t outer_stride, std::int64_t unit_stride, std::int64_t inner_stride,
                     const Order& outer_order, const Order& inner_order, int centered_dtype, bool unit_major,
                     std::uintptr_t centered, std::uintptr_t mean, std::uintptr_t squares) {
  const CenterProblem problem{static_cast<ScalarType>(dtype),
                              pointer<const void>(features),
                              outer,
                              units,
                              inner,
                              outer_stride,
                              unit_stride,
                              inner_stride,
                              order_of(outer_order),
                              order_of(inner_order),
                              static_cast<ScalarType>(centered_dtype),
                              unit_major,
                              pointer<void>(centered),
                              pointer<double>(mean),
                              pointer<double>(squares),
                              threads};
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), center_features, problem);
}

void accumulate_comoment(int isa, int threads, int product_dtype, std::uintptr_t product, std::uintptr_t row_shift,
                         std::uintptr_t column_shift, std::int64_t units, std::uintptr_t comoment) {
  const AccumulateProblem problem{static_cast<ScalarType>(product_dtype),
                                  pointer<const void>(product),
                                  pointer<const double>(row_shift),
                                  pointer<const double>(column_shift),
                                  units,
                                  pointer<double>(comoment),
                                  threads};
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), accumulate_comoment, problem);
}

void correlate(int isa, int threads, std::uintptr_t comoment, std::uintptr_t row_deviation,
               std::uintptr_t column_deviation, std::int64_t units, double count, double eps, int dtype,
               std::uintptr_t out, std::uintptr_t mirror, std::int64_t row_stride, std::uintptr_t other,
               std::int64_t other_stride, double balance) {
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
                                 threads};
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), correlate, problem);
}

}  // namespace

void register_correlation(py::module_& module) {
  module.def("center_features", &center_features, py::arg("isa"), py::arg("threads"), py::arg("dtype"),
             py::arg("features"), py::arg("outer"), py::arg("units"), py::arg("inner"), py::arg("outer_stride"),
             py::arg("unit_stride"), py::arg("inner_stride"), py::arg("outer_order"), py::arg("inner_order"),
             py::arg("centered_dtype"), py::arg("unit_major"), py::arg("centered"), py::arg("mean"),
             py::arg("squares"));
  module.def("accumulate_comoment", &accumulate_comoment, py::arg("isa"), py::arg("threads"), py::arg("product_dtype"),
             py::arg("product"), py::arg("row_shift"), py::arg("column_shift"), py::arg("units"), py::arg("comoment"));
  module.def("correlate", &correlate, py::arg("isa"), py::arg("threads"), py::arg("comoment"), py::arg("row_deviation"),
             py::arg("column_deviation"), py::arg("units"), py::arg("count"), py::arg("eps"), py::arg("dtype"),
             py::arg("out"), py::arg("mirror"), py::arg("row_stride"), py::arg("other"), py::arg("other_stride"),
             py::arg("balance"));
}

}  // namespace mudsc::bindings
