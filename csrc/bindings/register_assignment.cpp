#include "bindings.hpp"

namespace mudsc::bindings {

void register_assignment(py::module_& module) { (void)module; }

}  // namespace mudsc::bindings
