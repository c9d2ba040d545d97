// Everything that runs on the host in the tests, for nvcc: to see what it compiles to on a device.
#include "channel_gram.cuh"
#include "probes.cuh"

namespace restore_kernels {

namespace channel {
template __global__ void channel_gram_kernel<float, true>(Gram<float>);
template __global__ void channel_gram_kernel<bfloat16, false>(Gram<bfloat16>);
template __global__ void channel_gram_kernel<float16, false>(Gram<float16>);
}  // namespace channel

namespace probes {
template __global__ void reverse<Fence::kWarp>(const float*, float*);
template __global__ void copy_through_shared<true>(const uint4*, uint4*, int);
template __global__ void pack_pairs<bfloat16>(const float*, unsigned*);
template __global__ void pack_pairs<float16>(const float*, unsigned*);
template __global__ void multiply<float>(const unsigned (*)[4], const unsigned (*)[2], float (*)[4]);
template __global__ void multiply<bfloat16>(const unsigned (*)[4], const unsigned (*)[2], float (*)[4]);
template __global__ void multiply<float16>(const unsigned (*)[4], const unsigned (*)[2], float (*)[4]);
}  // namespace probes

}  // namespace restore_kernels
