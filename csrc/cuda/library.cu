// What the compiled CUDA library says of itself.
#include <string>

#include <torch/csrc/stable/library.h>

namespace restore_kernels {

std::string build_info() {
#ifdef __CUDACC__
  std::string architectures;
  for (int number : {__CUDA_ARCH_LIST__})
    architectures += (architectures.empty() ? "" : ", ") + std::to_string(number / 10);
  return "nvcc " + std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + ", sm " +
         architectures;
#else
  return "host execution";
#endif
}

}  // namespace restore_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(restore_kernels, library) { library.def("cuda_build_info() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(restore_kernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_build_info", TORCH_BOX(restore_kernels::build_info));
}
