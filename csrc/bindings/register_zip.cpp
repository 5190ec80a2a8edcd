#include "bindings.hpp"

namespace mudsc::bindings {

void register_zip(py::module_& module) { (void)module; }

}  // namespace mudsc::bindings
