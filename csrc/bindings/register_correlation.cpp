#include "bindings.hpp"

namespace mudsc::bindings {

void register_correlation(py::module_& module) { (void)module; }

}  // namespace mudsc::bindings
