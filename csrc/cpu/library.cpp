// The Python module of the CPU library. Importing it registers the operators (TORCH_LIBRARY_IMPL in
// the other files); the module itself only says how it was built.
#include <pybind11/pybind11.h>

#include <string>

#define TO_STRING_(x) #x
#define TO_STRING(x) TO_STRING_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", [] {
    return std::string(TO_STRING(CPU_CAPABILITY)) + ", " + __VERSION__ + ", " + RESTORE_KERNELS_FLAGS;
  });
}
