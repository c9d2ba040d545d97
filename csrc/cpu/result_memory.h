// Memory of large results, kept for the next results of that size.
#pragma once

#include <ATen/core/Tensor.h>

namespace restore_kernels {

// As at::empty. Large tensors come from blocks of earlier results, at most 128 MiB of them kept: the
// system would take freed blocks back and hand out fresh pages, whose first touch costs more time than
// the arithmetic of their contents.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace restore_kernels
