// How the arguments of a permutation become a PermuteProblem: shared by both bindings of the op.
#pragma once

#include <cstdint>

#include "mudsc/permute.hpp"
#include "tensors.hpp"

namespace mudsc::bindings {

// The kernels take at most two mapped axes.
constexpr int kMaxMapped = 2;

// A tensor viewed as [outer, rows, middle, columns, inner]. An axis is -1 if that part of the view has no map.
struct PermuteView {
  std::int64_t outer = 1;
  std::int64_t rows = 1;
  int row_axis = -1;
  std::int64_t middle = 1;
  std::int64_t columns = 1;
  int column_axis = -1;
  std::int64_t inner = 1;
};

// The view of a tensor for mapped axes in ascending order.
PermuteView permute_view(const std::int64_t* shape, int num_axes, const int* mapped, int num_mapped);

struct MappedAxis {
  int axis;
  AxisMap map;
};

// A problem whose `tensors`, `weights` and `out` are still to be set. Mapped axes are in ascending order.
PermuteProblem permute_problem(ScalarType type, const std::int64_t* shape, int num_axes, const MappedAxis* mapped,
                               int num_mapped);

// Names of the attributes of UnitMap.
struct UnitMapNames {
  py::str on_cpu{"on_cpu"}, is_permutation{"is_permutation"}, units_in{"units_in"}, units_out{"units_out"};
};

// Reads a UnitMap of `num_models` models and `length` input units. Returns false, possibly with an exception set, if
// the object is not one. `arrays` keeps the memory that the map points to alive.
bool read_unit_map(const UnitMapNames& names, PyObject* object, std::int64_t length, std::int64_t num_models,
                   AxisMap& map, py::object& arrays);

// Results of at least this size are placed on huge pages: touching new memory costs more than the sum itself, and less
// on huge pages.
constexpr std::int64_t kHugePages = 1 << 22;

// Returns a function that runs whole calls of mudsc_fast.permute_merge for common arguments, or None if torch is too
// old.
py::object fast_permute_merge(const py::object& torch_module, const py::object& map_type);

}  // namespace mudsc::bindings
