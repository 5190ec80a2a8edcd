#include "bindings.hpp"

namespace mudsc::bindings {

void register_permute(py::module_& module) { (void)module; }

}  // namespace mudsc::bindings
