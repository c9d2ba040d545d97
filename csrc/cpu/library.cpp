// The Python module of the CPU library. Importing it registers the operators (TORCH_LIBRARY_IMPL in
// the other files); the module itself offers their autograd nodes and the public functions for plain calls, and says
// how it was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "autograd.h"
#include "bfloat16_pairs.h"
#include "calls.h"

#define TO_STRING_(x) #x
#define TO_STRING(x) TO_STRING_(x)

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using WithoutGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("bilinear_resize", restore_kernels::bilinear_resize, WithoutGil());
  m.def("channel_topk", restore_kernels::channel_topk, WithoutGil());
  m.def("token_topk", restore_kernels::token_topk, WithoutGil());
  m.def("channel_masked", restore_kernels::channel_masked, WithoutGil());
  m.def("token_masked", restore_kernels::token_masked, WithoutGil());
  m.def("channel_gate", restore_kernels::channel_gate, WithoutGil());
  m.def("channel_norm", restore_kernels::channel_norm, WithoutGil());
  m.def("dense_conv", restore_kernels::dense_conv, WithoutGil());
  m.def("depthwise_conv", restore_kernels::depthwise_conv, WithoutGil());
  m.def("pointwise_conv", restore_kernels::pointwise_conv, WithoutGil());
  m.def("channel_gate_call", restore_kernels::channel_gate_call);
  m.def("channel_norm_call", restore_kernels::channel_norm_call);
  m.def("depthwise_conv2d_call", restore_kernels::depthwise_conv2d_call);
  m.def("pointwise_conv2d_call", restore_kernels::pointwise_conv2d_call);
  m.def("topk_attention_call", restore_kernels::topk_attention_call);
  m.def("masked_attention_call", restore_kernels::masked_attention_call);
  m.def("bfloat16_instructions", restore_kernels::pairs::instructions);
  m.def("build_info", [] {
    return std::string(TO_STRING(CPU_CAPABILITY)) + ", " + __VERSION__ + ", " + RESTORE_KERNELS_FLAGS;
  });
}
