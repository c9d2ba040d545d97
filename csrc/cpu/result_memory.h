// Memory of results, kept for the next results of that size.
#pragma once

#include <ATen/core/Tensor.h>

namespace restore_kernels {

// As at::empty. Large tensors come from the blocks of earlier results, on huge pages: the system would take freed
// blocks back and hand out fresh pages, whose first touch costs more time than the arithmetic of their contents. Small ones
// come from such blocks too, of which 8 MiB are kept: among large ones the system's allocator searches for their place anew each time, and freeing
// one may make it give back all that others have freed around it.
// Kept are at most an eighth of the machine's memory; and blocks kept and in use together take no more than those in
// use once did, but for 128 MiB.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace restore_kernels
