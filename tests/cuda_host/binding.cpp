// Apart from the kernels, so that it is compiled once for all builds of them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "kernels.h"

using namespace restore_kernels::host_tests;

PYBIND11_MODULE(cuda_host_kernels, module) {
  module.def("seed", seed);
  module.def("gram", gram);
  module.def("reverse", reverse);
  module.def("copy_vectors", copy_vectors);
  module.def("copy_through_shared", copy_through_shared);
  module.def("warp_calls", warp_calls);
  module.def("histogram", histogram);
  module.def("multiply", multiply);
  module.def("load_matrices", load_matrices);
  module.def("pack", pack);
  module.def("fault", fault);
}
