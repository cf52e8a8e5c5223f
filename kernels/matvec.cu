// y[m, n] = sum_k x[m, k] * w[n, k]      for 1 <= m <= 16       w [N, K] row-major, x [M, K], y [M, N]
//   matvec         y in the element type
//   matvec_float   y in float32, rows `stride` apart (logits)
//   matvec_silu    w holds gate rows, then up rows [2N, K]; y = silu(gate) * up
//
// Bound by bytes: the weights, read once, N * K * 2 bytes; everything else is noise. At 16 rows that is 16 multiply-adds a weight,
// far below what either unit can do, but float32 units would need 16 conversions and multiply-adds a weight and lag behind.
// Ladder
//   1. one thread a row of w: uncoalesced, a tenth of the bandwidth
//   2. one warp a row, 16-byte loads, shuffles: 80 % for one row of x, and it slows down with each further row
//   3. copies of a whole tile issued before the first use, and before the wait for the previous kernel: the weight stream never
//      pauses between kernels
//   4. tensor cores (matvec.cuh): all M cost the same
//   5. blocks that stay and walk over tiles (this one): x is fetched once a block and kept in registers, and the next tile's weights
//      are on their way while this one is summed up. Fetching x for each tile cost 300 us of 1,100 a token at 8 rows
//   Tried and dropped: asking weights of the kernels behind the next one into the L2 cache, to fill the pauses between kernels. Every
//      variant cost more than it brought (up to 6 % of a step on an H100): the requests stand in front of those that are waited for
#include "matvec.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec(const elem* __restrict__ w, const elem* x, elem* __restrict__ y, int n, int m) {
  walk<false>((n + 15) / 16, Plain{x}, m, Neighbours{w, n}, Nothing{}, Nothing{}, StoreTile<elem>{y, n, n});
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_float(const elem* __restrict__ w, const elem* x, float* __restrict__ y, int n, int m, int stride) {
  walk<false>((n + 15) / 16, Plain{x}, m, Neighbours{w, n}, Nothing{}, Nothing{}, StoreTile<float>{y, n, stride});
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
matvec_silu(const elem* __restrict__ w, const elem* __restrict__ bias, const elem* x, elem* __restrict__ y, int n, int m) {
  walk<false>((n + 7) / 8, Plain{x}, m, GateAndUp{w, n}, Nothing{}, Nothing{}, StoreSilu{y, bias, n});
}
