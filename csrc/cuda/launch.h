// Launches kernels: on the device's current stream (nvcc), or on the host (g++, host/execution.h).
//
//   launch(kernel, blocks, threads, dynamic_bytes, arguments...)   a grid along x; nothing for no blocks
//   processors()                                                   of the current device
//   OnDevice guard(tensor)                                         makes the tensor's device current
//
// What cannot be launched throws std::runtime_error.
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

namespace restore_kernels {

constexpr int64_t kMostBlocks = 0x7fffffff;  // of a grid along x
constexpr size_t kSharedWithoutAsking = 48 * 1024;
// Of a block: what every GPU from compute capability 8.0 on has, and what those of servers have, for which coverage.py
// asks before a kernel that needs it is chosen.
constexpr size_t kSharedEverywhere = 99 * 1024, kSharedOfMany = 163 * 1024;

inline void check_blocks(int64_t blocks) {
  if (blocks < 0 || blocks > kMostBlocks)
    throw std::runtime_error("a CUDA kernel cannot have " + std::to_string(blocks) + " blocks, at most " +
                             std::to_string(kMostBlocks));
}

}  // namespace restore_kernels

#ifdef __CUDACC__

#include <cuda_runtime.h>

// A CPU build of PyTorch lacks it; the library must load there all the same. It is in a library of PyTorch's that
// torch_cpu does not need: without -ltorch (setup.py) it would not be found in a CUDA build either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace restore_kernels {

using OnDevice = torch::stable::accelerator::DeviceGuard;

inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be told of it, too
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

inline int current_device() {
  int device;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int processors() {
  int count;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()), "cudaDeviceGetAttribute");
  return count;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_bytes,
            const Arguments&... arguments) {
  check_blocks(blocks);
  if (blocks == 0) return;
  void* stream;
  if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(current_device(), &stream))
    throw std::runtime_error("PyTorch gives no CUDA stream");
  static std::mutex asking;
  std::unique_lock<std::mutex> alone(asking, std::defer_lock);
  if (dynamic_bytes > kSharedWithoutAsking) {
    alone.lock();  // until the launch: another thread may ask for less
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes)),
          "cudaFuncSetAttribute");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "kernel launch");
}

}  // namespace restore_kernels

#else  // the host

namespace restore_kernels {

struct OnDevice {
  explicit OnDevice(int) {}
};

inline int processors() { return 2; }  // few, so that small problems are split as large ones are on a device

namespace cuda_host {
inline uint64_t seed = 0;  // draws the order of blocks and threads of the next launches
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t dynamic_bytes,
            const Arguments&... arguments) {
  check_blocks(blocks);
  if (blocks == 0) return;
  cuda_host::launch(kernel, static_cast<unsigned>(blocks), threads, dynamic_bytes, cuda_host::seed, arguments...);
}

}  // namespace restore_kernels

#endif
