// Shared by the register_<op>.cpp files.
//
// Bindings read and check tensors by tensors.hpp, release the GIL and call the kernel of the requested instruction
// level. For small inputs register_assignment.cpp and fast_permute.cpp do a whole call of the public function.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "mudsc/isa.hpp"
#include "mudsc/types.hpp"

namespace mudsc::bindings {

namespace py = pybind11;

template <class T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Instruction level for a kernel that is called directly, without mudsc_fast.ops._dispatch: the processor's best,
// capped by MUDSC_ISA; -1 if the environment names another backend or an unknown level.
inline int isa_of_environment() {
  static const int supported = static_cast<int>(supported_isa());
  const char* const backend = std::getenv("MUDSC_BACKEND");
  if (backend != nullptr && *backend != '\0') return -1;
  const char* const cap = std::getenv("MUDSC_ISA");
  if (cap == nullptr || *cap == '\0') return supported;
#if MUDSC_X86_64
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};
#else
  constexpr const char* kNames[] = {"baseline"};
#endif
  int level = 0;
  for (const char* name : kNames) {
    if (std::strcmp(cap, name) == 0) return level < supported ? level : supported;
    ++level;
  }
  return -1;
}

// A Python function that receives its raw arguments, without the tuple and the conversions of module.def; `self`, if
// there is one, is passed first.
template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
py::object plain_function(const char* name, py::handle self = py::handle()) {
  static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
                                nullptr};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, self.ptr()));
}

void register_assignment(py::module_& module);
void register_correlation(py::module_& module);
void register_permute(py::module_& module);
void register_zip(py::module_& module);

}  // namespace mudsc::bindings
