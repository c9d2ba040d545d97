// How kernels see tensors.
#pragma once

#include "device.cuh"

namespace restore_kernels {

// A tensor of four dimensions, of any strides, in elements.
template <typename T>
struct Strided {
  T* data;
  int64_t stride[4];

  __host__ __device__ T* at(int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) const {
    return data + i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3];
  }
};

}  // namespace restore_kernels
