// Shared by the register_<op>.cpp files.
//
// Bindings take addresses and sizes that python/mudsc_fast/kernels/cpu has checked, release the GIL and call the
// kernel of the requested instruction level. They convert and check nothing else, with one exception: for small
// arrays register_assignment.cpp checks what it is given and makes the results itself, and declines all else.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc::bindings {

namespace py = pybind11;

template <class T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void register_assignment(py::module_& module);
void register_correlation(py::module_& module);
void register_permute(py::module_& module);
void register_zip(py::module_& module);

}  // namespace mudsc::bindings
