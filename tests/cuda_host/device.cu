// Everything that runs on the host in the tests, for nvcc: to see what it compiles to on a device.
#include "channel_gram.cuh"
#include "probes.cuh"

namespace restore_kernels {

namespace channel_gram {
template __global__ void channel_gram_kernel<float, 32, true>(Problem<float>);
template __global__ void channel_gram_kernel<float, 32, false>(Problem<float>);
template __global__ void channel_gram_kernel<float, 48, true>(Problem<float>);
template __global__ void channel_gram_kernel<float, 48, false>(Problem<float>);
template __global__ void channel_gram_kernel<bfloat16, 32, true>(Problem<bfloat16>);
template __global__ void channel_gram_kernel<bfloat16, 32, false>(Problem<bfloat16>);
template __global__ void channel_gram_kernel<bfloat16, 48, true>(Problem<bfloat16>);
template __global__ void channel_gram_kernel<bfloat16, 48, false>(Problem<bfloat16>);
template __global__ void channel_gram_kernel<float16, 32, true>(Problem<float16>);
template __global__ void channel_gram_kernel<float16, 32, false>(Problem<float16>);
template __global__ void channel_gram_kernel<float16, 48, true>(Problem<float16>);
template __global__ void channel_gram_kernel<float16, 48, false>(Problem<float16>);
}  // namespace channel_gram

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
