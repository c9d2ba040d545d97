// Pyramid attention with patches of 3 x 3, forward and backward. float32, bfloat16, float16; sums in float32.
//
// n of the pixels of the query, l of those of a level; shifts d of a patch; s, g products of pixels:
//   S_nl = scale_l Σ_d s[n + d, l + d]    s = q kᵀ;  scale_l = softmax_scale / max(|patch l|, eps)
//   P = exp(S - L)                         L: log_sum_exp over all levels
//   out = out_scale box(P) v               box(P)[n, l] = Σ_d P[n + d, l + d]
//   dP = out_scale box(g)                  g = do vᵀ;  r = rowsum(P dP)
//   dS = P (dP - r)                        dq = box(dS scale) k;  dv = out_scale box(P)ᵀ do
//   dk = box(dS scale)ᵀ q - what norms take away (pyramid_images.cuh)
// No matrix of one number per pair is stored; splits write their sums and a second kernel adds them in order,
// so results depend on nothing but sizes and the number of processors.
//
// Schedule of pyramid_kernel (pyramid_walk.cuh): a block owns R = 4 rows and 32 columns (16 in float32) of one
// image, 30 (14) of them in passes that mix, and some tiles of 16 columns of the other one. Along y the filters
// are sums of three tiles of a chain, the pairs of rows (y, y + offset) for all y: each of W = 8 warps (4) walks
// a chain of its own, whose neighbours overlap in the rows that they read, and keeps the last tiles in registers.
// Along x there is no filter: rows of the products' operands are patches of 3 x 1, read as shifted fragments
// (pyramid_tiles.cuh). In a pass that mixes, warps leave filtered weights in shared memory as operands; then each
// multiplies those of one row, all chains of the group, with shifted pixels, and keeps the sums in registers.
//
// Why so, for Cq = 32 and Cv = 64 in bfloat16, forward (L, then out), per pair of pixels, halos included, as
// cycles of one of H200's processors: mma.sync 2458 operations (60 % of what wgmma does), 128 bytes of shared
// memory, 16 exponentials.
//                                       operations      shared memory     exponentials
//   pixels, filters in shared memory    444    0.18     130 B   1.0       3.8   0.24
//   3 x 3 patches                       2304   0.94      72 B   0.56      2     0.13
//   this: 3 x 1 patches and chains      1108   0.45      54 B   0.42      2.6   0.16
// The first one's 8 x 8 tiles need halos of 1 or 2 pixels on both sides, and 24 B a filter and pair; the second
// one's L needs no halo. wgmma would take this one's operations to 0.27 cycles and leave the rest, a gain of a
// tenth at most unless operands came from elsewhere than shared memory.
//
// So the 8.9e8 pairs of 128 x 128 pixels and five levels take at least 1.7 ms forward on H200 and 3.2 ms on A100
// (2048 operations a cycle, 108 processors at 1.41 GHz). Backward: r 864, dq 1434, dk 1434, dv 822 operations a
// pair, 1.85 cycles, and 235 B, 1.84 cycles: 6.8 ms on H200. float32 multiplies in three tf32 products at half
// the rate: 10 ms forward. float16 goes backward as float32 does, for want of range. Not measured yet.
// Keys and values of all levels stay in the L2 cache, of which a pair reads 1.8 B: 8 rows of 18 pixels for
// 8 chains of 4 rows of 30 x 16 pairs.
//
// Occupancy: one block of 8 warps a processor (4 in float32), by shared memory (at most 163 KiB a block for 32 and
// 64 channels) and by registers (up to 255 a thread in bfloat16: three filters hold two tiles each). New rows come while those that they replace are idle.
#pragma once

#include "pyramid_images.cuh"
#include "pyramid_walk.cuh"
