#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.hpp"
#include "permute_arguments.hpp"

namespace mudsc::bindings {
namespace {

// The maps of a call, in ascending order of their axes, and what keeps their memory.
struct Maps {
  MappedAxis mapped[kMaxMapped];
  py::object held[kMaxMapped];
  int count = 0;
};

void read_maps(const py::dict& maps, const TensorView& tensor, std::int64_t num_models, Maps& read) {
  static const UnitMapNames* const names = new UnitMapNames;  // kept: Python may be gone at exit
  if (maps.size() > kMaxMapped) throw py::value_error("maps must have at most two axes");
  for (const auto& [axis_object, unit_map] : maps) {
    const int axis = axis_object.cast<int>();
    if (axis < 0 || axis >= tensor.num_axes) throw py::value_error("maps has an axis that the tensors do not have");
    MappedAxis& mapped = read.mapped[read.count];
    mapped.axis = axis;
    if (!read_unit_map(*names, unit_map.ptr(), tensor.shape[axis], num_models, mapped.map, read.held[read.count])) {
      PyErr_Clear();
      throw py::value_error("maps[" + std::to_string(axis) + "] does not fit the tensors");
    }
    ++read.count;
  }
  std::sort(read.mapped, read.mapped + read.count,
            [](const MappedAxis& a, const MappedAxis& b) { return a.axis < b.axis; });
}

std::int64_t entries_out(const PermuteProblem& problem) {
  return problem.outer * problem.rows.units_out * problem.middle * problem.columns.units_out * problem.inner;
}

void merge(const py::list& tensors, const py::dict& maps, const std::vector<double>& weights, const py::object& out,
           bool out_is_new, int isa, int threads) {
  if (tensors.empty() || weights.size() != tensors.size()) throw py::value_error("weights must have one per tensor");
  const TensorView first(tensors[0], "tensors[0]");
  first.expect_float();
  std::vector<const void*> addresses;
  for (const py::handle object : tensors) {
    const TensorView tensor(object, "tensors");
    tensor.expect_type(first.type);
    tensor.expect_shape(first.shape, static_cast<std::size_t>(first.num_axes));
    tensor.expect_contiguous();
    addresses.push_back(tensor.data);
  }
  Maps read;
  read_maps(maps, first, static_cast<std::int64_t>(tensors.size()), read);
  PermuteProblem problem = permute_problem(first.scalar_type(), first.shape, first.num_axes, read.mapped, read.count);
  const TensorView result(out, "out");
  result.expect_type(first.type);
  result.expect_contiguous();
  if (result.entries() != entries_out(problem)) throw py::value_error("out must have the shape of the result");
  problem.num_models = static_cast<std::int64_t>(tensors.size());
  problem.tensors = addresses.data();
  problem.weights = weights.data();
  problem.out = result.data;
  problem.out_is_new = out_is_new && result.entries() * kScalarBytes[static_cast<int>(problem.dtype)] >= kHugePages;
  problem.threads = threads;
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_merge, problem);
}

void permute_in_place(const py::object& tensor, const py::dict& maps, int isa, int threads) {
  const TensorView target(tensor, "tensor");
  target.expect_float();
  target.expect_contiguous();
  Maps read;
  read_maps(maps, target, 1, read);
  PermuteProblem problem =
      permute_problem(target.scalar_type(), target.shape, target.num_axes, read.mapped, read.count);
  if (problem.rows.kind == UnitMapKind::clusters || problem.columns.kind == UnitMapKind::clusters ||
      target.entries() != entries_out(problem)) {
    throw py::value_error("maps must be permutations to be applied in place");
  }
  problem.out = target.data;
  problem.threads = threads;
  const py::gil_scoped_release released;
  MUDSC_CALL_KERNEL(static_cast<Isa>(isa), permute_in_place, problem);
}

using ViewTuple = std::tuple<std::int64_t, std::int64_t, int, std::int64_t, std::int64_t, int, std::int64_t>;

ViewTuple view(const std::vector<std::int64_t>& shape, std::vector<int> axes) {
  std::sort(axes.begin(), axes.end());
  if (axes.size() > kMaxMapped) throw py::value_error("axes must be at most two");
  const PermuteView seen =
      permute_view(shape.data(), static_cast<int>(shape.size()), axes.data(), static_cast<int>(axes.size()));
  return {seen.outer, seen.rows, seen.row_axis, seen.middle, seen.columns, seen.column_axis, seen.inner};
}

}  // namespace

void register_permute(py::module_& module) {
  module.def("fast_permute_merge", &fast_permute_merge, py::arg("torch"), py::arg("map_type"));
  module.def("permute_merge", &merge, py::arg("tensors"), py::arg("maps"), py::arg("weights"), py::arg("out"),
             py::arg("out_is_new"), py::arg("isa"), py::arg("threads"));
  module.def("permute_in_place", &permute_in_place, py::arg("tensor"), py::arg("maps"), py::arg("isa"),
             py::arg("threads"));
  module.def("permute_view", &view, py::arg("shape"), py::arg("axes"));
  module.def("read_tensors_by_attributes", &read_tensors_by_attributes, py::arg("enabled"));
}

}  // namespace mudsc::bindings
