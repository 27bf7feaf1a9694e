r"""CUDA C++ kernels of the decode path, compiled at run time (this file is byte-identical in both directories).

Why CUDA C++ beside the Triton kernels of quantization.py
    Those serve every forward pass, on any GPU that Triton knows. A decode step needs more than a matmul: NF4 and
    fp16 weights too, the residual, SwiGLU or GELU in the matmul's epilogue, weights that are fetched while the
    kernel before still runs, and dequantized weights that go straight into the tensor cores' registers, which Triton
    cannot place there. NVRTC comes with PyTorch's CUDA builds: no nvcc, no headers, no prebuilt binary, and 0.05 to
    0.25 s per kernel, so that nothing is cached or tuned at run time.

matvec: y[M, N] = f(x[M, K] @ W[N, K].T), M <= 16
    One block owns 16 rows of W, its warps share K. A lane loads 16 bytes of row g and of row g + 8 and feeds them to
    mma.m16n8k16 as the A operand; x is the B operand with M padded to 8 or 16 columns. The sum over K does not
    depend on the order of K as long as A and B agree, so weights are used in the order in which they lie in memory:
    no shuffles. Per 8 int4 weights: 4 lop3, 4 fma, half an mma.
    Weights: fp16/bf16; int8 and int4 rows (quantization.py); NF4 in blocks of 64 (bitsandbytes).
    The epilogue applies row scale, bias and LoRA update, then stores, adds a residual, or applies SwiGLU or GELU.

decode_attention: one new token per sequence against the cache (B, G, S, D)
    It rotates the new query and key, and stores key and value on the way. S is split over the blocks of a cluster,
    which join through each other's shared memory (compute capability 9.0 and later; elsewhere a cluster is one
    block), and a long S over several clusters, joined by the last block.

norm: RMSNorm or LayerNorm of rows.

Every kernel prefetches what does not depend on its predecessor (the weights) before it waits for it
("programmatic dependent launch", compute capability 9.0 and later; elsewhere launches follow each other).

Shapes: M rows of x (one per sequence), N out, K in, B batch, H query heads, G key/value heads, D head_dim,
S cache slots.
"""

SOURCE = r"""
#ifndef WARPS  // kernels other than matvec are compiled without its tuning
#define WARPS 8
#define DEPTH 4
#define MIN_BLOCKS 2
#define ROW_TILES 1
#endif
#ifndef CLUSTER  // likewise, for kernels other than decode_attention
#define CLUSTER 1
#endif
typedef unsigned int u32; typedef unsigned short u16; typedef unsigned char u8;
enum { FLOAT, INT8, INT4, NF4 };
enum { STORE, RESIDUAL, SWIGLU, GELU };

__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Numbers: BF 0 = fp16, 1 = bf16; u32 holds a pair, the first element in the low half.
template <int BF> __device__ __forceinline__ float to_float(u16 x) {
  if (BF) return __uint_as_float((u32)x << 16);
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;
}
template <int BF> __device__ __forceinline__ u16 from_float(float x) {
  u16 y;
  if (BF) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
template <int BF> __device__ __forceinline__ float rounded(float x) { return to_float<BF>(from_float<BF>(x)); }
template <int BF> __device__ __forceinline__ u32 pair(float lo, float hi) {
  u32 y;
  if (BF) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}
template <int BF> __device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 y;
  if (BF) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
  u32 y; asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector)); return y;
}
template <int MASK, int OR> __device__ __forceinline__ u32 and_or(u32 x) {
  u32 y; asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "n"(MASK), "n"(OR)); return y;
}
template <int BF> __device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#define MMA(TYPE) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 " \
    "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if (BF) MMA("bf16"); else MMA("f16");
}
__device__ __forceinline__ uint4 load_weights(const void* p) {  // read once: past L1, first out of L2
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// One 32-bit word of a row -> pairs of weights, in the order of `arrange`.
template <int FMT, int BF> struct Dequantizer;
template <int BF> struct Dequantizer<FLOAT, BF> {
  static const int BITS = 16, PAIRS = 1;
  static __device__ __forceinline__ void dequantize(u32 w, u32* out) { out[0] = w; }
};
template <int BF> struct Dequantizer<INT8, BF> {
  static const int BITS = 8, PAIRS = 2;
  static __device__ __forceinline__ void dequantize(u32 w, u32* out) {
    u32 v = w ^ 0x80808080u;  // code + 128, 0..255
    if (BF) {  // 2^23 + v in fp32, then exact in bf16: a code has 8 bits
      float f[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(prmt(v, 0x4B000000u, 0x7650 + i)) - 8388736.0f;
      out[0] = pair<BF>(f[0], f[1]); out[1] = pair<BF>(f[2], f[3]);
    } else {   // 1024 + v by writing the exponent, minus 1152
      out[0] = fma2<BF>(prmt(v, 0x64646464u, 0x4140), 0x3C003C00u, 0xE480E480u);
      out[1] = fma2<BF>(prmt(v, 0x64646464u, 0x4342), 0x3C003C00u, 0xE480E480u);
    }
  }
};
template <int BF> struct Dequantizer<INT4, BF> {  // byte j: column 2j high, 2j+1 low -> pairs (1,5) (0,4) (3,7) (2,6)
  static const int BITS = 4, PAIRS = 4;
  static __device__ __forceinline__ void dequantize(u32 w, u32* out) {
    u32 v = w ^ 0x88888888u;  // code + 8, 0..15
    if (BF) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        out[i] = fma2<BF>(and_or<0x000F000F, 0x43004300>(v >> (4 * i)), 0x3F803F80u, 0xC308C308u);  // 128 + v - 136
    } else {
      u32 u = v >> 8;
      out[0] = fma2<BF>(and_or<0x000F000F, 0x64006400>(v), 0x3C003C00u, 0xE408E408u);   // 1024 + v - 1032
      out[1] = fma2<BF>(and_or<0x00F000F0, 0x64006400>(v), 0x2C002C00u, 0xD480D480u);   // (1024 + 16 v) / 16 - 72
      out[2] = fma2<BF>(and_or<0x000F000F, 0x64006400>(u), 0x3C003C00u, 0xE408E408u);
      out[3] = fma2<BF>(and_or<0x00F000F0, 0x64006400>(u), 0x2C002C00u, 0xD480D480u);
    }
  }
};
template <int BF> struct Dequantizer<NF4, BF> { static const int BITS = 4, PAIRS = 4; };  // by a table, see matvec
// Eight activations as four pairs, in the order in which the dequantizer yields weights.
template <int FMT> __device__ __forceinline__ void arrange(uint4 x, u32* out) {
  if (FMT == INT4) {
    out[0] = prmt(x.x, x.z, 0x7632); out[1] = prmt(x.x, x.z, 0x5410);
    out[2] = prmt(x.y, x.w, 0x7632); out[3] = prmt(x.y, x.w, 0x5410);
  } else { out[0] = x.x; out[1] = x.y; out[2] = x.z; out[3] = x.w; }
}

struct MatvecArgs {
  const u16* x; const void* weight; const u16* scale; const u16* bias; const u16* residual;
  const u16* lora_b; const float* lora_t;   // [N, R] with the LoRA scale in it, [M, R]
  void* out;
  int m, n, k, lora_rank, float_out; float alpha;
};

template <int BF>
__device__ __forceinline__ float finish(const MatvecArgs& a, int row, int m, float sum, bool scaled) {
  if (scaled) sum *= to_float<0>(a.scale[row]);  // scales are fp16
  if (a.bias) sum += to_float<BF>(a.bias[row]);
  for (int r = 0; r < a.lora_rank; ++r)
    sum += to_float<BF>(a.lora_b[(size_t)row * a.lora_rank + r]) * a.lora_t[m * a.lora_rank + r];
  return sum;
}

template <int FMT, int BF, int MT, int EPI>
__global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) matvec(MatvecArgs a) {
  const int VALUES = 128 / Dequantizer<FMT, BF>::BITS;         // weights in 16 bytes
  const int ROWS = 2 * ROW_TILES;                          // rows of W that a lane reads: g, g + 8, g + 16, ...
  __shared__ float sums[2][WARPS][8 * ROWS][8 * MT + 1];   // two sets: the next tile starts while this one is stored
  extern __shared__ u32 table[];                           // NF4: byte -> pair of values, one copy per lane
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int row_chunks = a.k / VALUES, steps = (row_chunks + 3) / 4;
  const size_t row_bytes = (size_t)row_chunks * 16;
  const int tile_rows = (EPI == SWIGLU ? 8 : 16) * ROW_TILES, outs = EPI == SWIGLU ? a.n / 2 : a.n;
  const int tiles = (outs + tile_rows - 1) / tile_rows;
  if (FMT == NF4) {  // scale points to 16 code values (fp16), then to the block maxima
    for (int i = warp; i < 256; i += WARPS) table[i * 32 + lane] = a.scale[i >> 4] | (u32)a.scale[i & 15] << 16;
    __syncthreads();
  }
  // SwiGLU pairs a gate row, r even, with its up row, r odd. Rows past the end are read, but not stored.
  auto row_of = [&](int tile, int r) {
    const int row = min(tile * tile_rows + g + 8 * (EPI == SWIGLU ? r / 2 : r), outs - 1);
    return EPI == SWIGLU && r % 2 ? outs + row : row;
  };
  uint4 ring[DEPTH][ROWS];
  auto load = [&](int tile, int chunk, int d) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      ring[d][r] = make_uint4(0, 0, 0, 0);
      if (chunk < row_chunks && tile < tiles)
        ring[d][r] = load_weights((const char*)a.weight + row_bytes * row_of(tile, r) + chunk * 16);
    }
  };
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) load(blockIdx.x, (warp + d * WARPS) * 4 + t, d);
  wait_for_predecessor();
  int parity = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
    float acc[ROW_TILES][MT][4] = {};
    // A warp takes every WARPS-th step of K. The ring holds DEPTH loads: each is refilled as soon as it has been read,
    // from the next tile where this one has no more steps, so that memory never waits for arithmetic.
    for (int base = warp; base < steps; base += WARPS * DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (base + d * WARPS >= steps) break;
        const int chunk = (base + d * WARPS) * 4 + t;
        u32 words[ROWS][4], scale[ROWS]; float largest[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const uint4 q = ring[d][r];
          words[r][0] = q.x; words[r][1] = q.y; words[r][2] = q.z; words[r][3] = q.w;
          if (FMT == NF4) {
            const size_t block = (size_t)row_of(tile, r) * (a.k / 64) + chunk / 2;
            const u16 m = chunk < row_chunks ? (a.scale + 16)[block] : 0;
            scale[r] = m | (u32)m << 16; largest[r] = to_float<0>(m);
          }
        }
        if (base + (d + DEPTH) * WARPS < steps) load(tile, chunk + DEPTH * WARPS * 4, d);
        else load(tile + gridDim.x, (warp + d * WARPS) * 4 + t, d);
#pragma unroll
        for (int group = 0; group < VALUES / 8; ++group) {  // eight weights of each row
          u32 x[MT][4], p[ROWS][4];
#pragma unroll
          for (int mt = 0; mt < MT; ++mt) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (g + 8 * mt < a.m && chunk < row_chunks)
              v = *(const uint4*)(a.x + (size_t)(g + 8 * mt) * a.k + (size_t)chunk * VALUES + group * 8);
            arrange<FMT>(v, x[mt]);
          }
          const int PAIRS = Dequantizer<FMT, BF>::PAIRS;
#pragma unroll
          for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < 4 / PAIRS; ++i) {           // words that hold eight weights
              const u32 word = words[r][group * (4 / PAIRS) + i];
              if constexpr (FMT == NF4) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                  const u32 two = table[((word >> (8 * j)) & 255) * 32 + lane];
                  if (BF) p[r][j] = pair<1>(to_float<0>(two) * largest[r], to_float<0>(two >> 16) * largest[r]);
                  else p[r][j] = fma2<0>(two, scale[r], 0);
                }
              } else Dequantizer<FMT, BF>::dequantize(word, p[r] + i * PAIRS);
            }
#pragma unroll
          for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
            for (int mt = 0; mt < MT; ++mt) {
              const u32 *q0 = p[2 * rt], *q1 = p[2 * rt + 1];
              mma<BF>(acc[rt][mt], q0[0], q1[0], q0[1], q1[1], x[mt][0], x[mt][1]);
              mma<BF>(acc[rt][mt], q0[2], q1[2], q0[3], q1[3], x[mt][2], x[mt][3]);
            }
        }
      }
    }
#pragma unroll
    for (int rt = 0; rt < ROW_TILES; ++rt)
#pragma unroll
      for (int mt = 0; mt < MT; ++mt)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          sums[parity][warp][rt * 16 + g + (i / 2) * 8][mt * 8 + t * 2 + i % 2] = acc[rt][mt][i];
    __syncthreads();  // the warps' parts of K lie in shared memory; any thread may sum them
    if (tile + gridDim.x >= tiles) let_successor_start();  // earlier: 7 % slower, it takes room and bandwidth
    for (int i = threadIdx.x; i < tile_rows * a.m; i += WARPS * 32) {
      const int r = i % tile_rows, m = i / tile_rows, row = tile * tile_rows + r;
      const int at_sum = EPI == SWIGLU ? r / 8 * 16 + r % 8 : r;
      if (row >= outs) continue;
      float sum = 0, up = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        sum += sums[parity][w][at_sum][m];
        if (EPI == SWIGLU) up += sums[parity][w][at_sum + 8][m];
      }
      const bool scaled = FMT == INT8 || FMT == INT4;
      float y = finish<BF>(a, row, m, sum, scaled);
      const size_t at = (size_t)m * outs + row;
      if (EPI == SWIGLU) {
        y = rounded<BF>(y); up = rounded<BF>(finish<BF>(a, outs + row, m, up, scaled));
        y = rounded<BF>(y / (1 + __expf(-y))) * up;
      } else if (EPI == GELU) {
        y = rounded<BF>(y); y = 0.5f * y * (1 + tanhf(0.7978845608028654f * (y + 0.044715f * y * y * y)));
      } else if (EPI == RESIDUAL) {
        y = rounded<BF>(a.alpha * to_float<BF>(a.residual[at])) + rounded<BF>(y);
      }
      if (a.float_out) ((float*)a.out)[at] = y; else ((u16*)a.out)[at] = from_float<BF>(y);
    }
  }
}

template <int WIDTH> __device__ __forceinline__ float block_sum(float x, float* shared) {
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll
  for (int w = 0; w < WIDTH / 32; ++w) x += shared[w];
  __syncthreads();
  return x;
}

// RMSNorm or, with LAYER, LayerNorm of rows of k elements, k a multiple of 8 up to 16384; a block per row.
template <int BF, int LAYER> __global__ void __launch_bounds__(512)
norm(const u16* x, const u16* weight, const u16* bias, u16* out, int k, float eps) {
  const int PER_THREAD = 4;  // eight elements each
  __shared__ float shared[16];
  uint4 raw[PER_THREAD], weights[PER_THREAD], shifts[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = (i * 512 + threadIdx.x) * 8;
    raw[i] = weights[i] = shifts[i] = make_uint4(0, 0, 0, 0);
    if (at < k) weights[i] = *(const uint4*)(weight + at);
    if (LAYER && at < k) shifts[i] = *(const uint4*)(bias + at);
  }
  let_successor_start();
  wait_for_predecessor();
  const size_t row = (size_t)blockIdx.x * k;
  float mean = 0, total = 0;
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = (i * 512 + threadIdx.x) * 8;
    if (at < k) raw[i] = *(const uint4*)(x + row + at);
  }
#define ELEMENT(VECTOR, I, E) to_float<BF>(((const u16*)&VECTOR[I])[E])
  if (LAYER) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) total += ELEMENT(raw, i, e);
    mean = block_sum<512>(total, shared) / k;
    total = 0;
  }
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i)
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float v = ELEMENT(raw, i, e) - mean;
      if ((i * 512 + threadIdx.x) * 8 < k) total += v * v;
    }
  const float factor = rsqrtf(block_sum<512>(total, shared) / k + eps);
#pragma unroll
  for (int i = 0; i < PER_THREAD; ++i) {
    const int at = (i * 512 + threadIdx.x) * 8;
    uint4 y;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float v = (ELEMENT(raw, i, e) - mean) * factor * ELEMENT(weights, i, e);
      if (LAYER) v += ELEMENT(shifts, i, e);
      ((u16*)&y)[e] = from_float<BF>(v);
    }
    if (at < k) *(uint4*)(out + row + at) = y;
  }
}

struct DecodeAttentionArgs {
  const u16* qkv; u16* keys; u16* values; const u16* cos; const u16* sin;
  const int* positions;   // [B, 2], the token's two positions
  const int* starts;      // [B], first slot that is not padding
  const int* length;      // [1], slots that are filled, this token's excepted
  float* partial; u32* counters; u16* out;
  int num_heads, num_kv_heads, slots; float scaling;
};

// Rotate elements at .. at + 7 of a head. TWO_D 0: ChatGLM2, interleaved pairs of the first half of a head.
// 1: ChatGLM-6B, half-split pairs in both halves, one position each. Tables: [positions, D / 4].
template <int BF, int D, int TWO_D> __device__ __forceinline__ uint4 rotated(
    const DecodeAttentionArgs& a, const u16* head, int at, const int* position) {
  const uint4 raw = *(const uint4*)(head + at);
  uint4 other = raw, cos, sin, out;
  int first = 0;  // TWO_D: whether these elements are the first of their pairs
  if (TWO_D) {
    const int in_half = at % (D / 2);
    first = in_half < D / 4;
    other = *(const uint4*)(head + at + (first ? D / 4 : -D / 4));
    const size_t entry = (size_t)position[at / (D / 2)] * (D / 4) + in_half % (D / 4);
    cos = *(const uint4*)(a.cos + entry); sin = *(const uint4*)(a.sin + entry);
  } else {
    if (at >= D / 2) return raw;
    const size_t entry = (size_t)position[0] * (D / 4) + at / 2;
    const uint2 c = *(const uint2*)(a.cos + entry), s = *(const uint2*)(a.sin + entry);
    cos = make_uint4(c.x, c.y, 0, 0); sin = make_uint4(s.x, s.y, 0, 0);
  }
#define PART(VECTOR, E) to_float<BF>(((const u16*)&VECTOR)[E])
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const int angle = TWO_D ? e : e / 2;
    const float sign = (TWO_D ? first : e % 2 == 0) ? -1 : 1;
    const float partner = TWO_D ? PART(other, e) : PART(raw, e ^ 1);
    ((u16*)&out)[e] = from_float<BF>(PART(raw, e) * PART(cos, angle) + sign * partner * PART(sin, angle));
  }
  return out;
}

// A cluster is CLUSTER blocks that read each other's shared memory; of one block, it needs nothing of the GPU.
#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 address_in(const void* shared, int rank) {
  u32 y; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(y) : "r"((u32)__cvta_generic_to_shared(shared)), "r"(rank));
  return y;
}
__device__ __forceinline__ float read_from(const float* shared, int rank) {
  float y; asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(y) : "r"(address_in(shared, rank))); return y;
}
__device__ __forceinline__ float2 read_pair_from(const float* shared, int rank) {
  float2 y;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(y.x), "=f"(y.y) : "r"(address_in(shared, rank)));
  return y;
}
#else
#define IN_CLUSTERS
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ float read_from(const float* shared, int) { return *shared; }
__device__ __forceinline__ float2 read_pair_from(const float* shared, int) { return *(const float2*)shared; }
#endif

// D elements of a head are read so that a lane's 16 bytes are contiguous in memory. mma sums over them in any order as
// long as both operands agree; what comes out is put back in place by `element_at`.
template <int BF, int D, int TWO_D> __global__ void IN_CLUSTERS __launch_bounds__(128)
decode_attention(DecodeAttentionArgs a) {
  __shared__ __align__(16) u16 query[16][D];
  __shared__ __align__(16) float context[4][16][D + 8];  // elements in the order of `element_at`
  __shared__ float maxima[4][16], totals[4][16];
  __shared__ bool is_last;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.y, b = blockIdx.z, heads_per_kv = a.num_heads / a.num_kv_heads;
  // Length, positions and the older part of the cache were written a whole graph ago: they need no wait.
  const int slot = a.length[0], start = a.starts[b], num_keys = slot + 1 - start;
  const int split = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER, max_splits = gridDim.x / CLUSTER;
  const int splits = min((num_keys + MIN_KEYS * CLUSTER - 1) / (MIN_KEYS * CLUSTER), max_splits);
  if (split >= splits) return;  // whole clusters
  const int blocks = splits * CLUSTER, per_block = ((num_keys + blocks - 1) / blocks + 15) / 16 * 16;
  const int begin = start + blockIdx.x * per_block, end = min(begin + per_block, slot + 1);  // may be empty
  const int width = TWO_D ? a.num_heads * 3 * D : (a.num_heads + 2 * a.num_kv_heads) * D;
  const u16* token = a.qkv + (size_t)b * width;
  const size_t cache = ((size_t)b * a.num_kv_heads + kv_head) * a.slots;
  const int* position = a.positions + b * 2;
  uint4 k[D / 16], v[D / 16];  // 16 keys and values
  auto load_keys = [&](int first) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int key = min(first + i / (D / 32) * 8 + g, end - 1);
      k[i] = ((const uint4*)(a.keys + (cache + key) * D + t * (D / 4)))[i % (D / 32)];
    }
  };
  auto load_values = [&](int first) {
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      const int row = i / (D / 64), key = min(first + t * 2 + row % 2 + row / 2 * 8, end - 1);
      v[i] = ((const uint4*)(a.values + (cache + key) * D + g * (D / 8)))[i % (D / 64)];
    }
  };
  int first = begin + warp * 16;
  const bool has_keys = first < end, is_old = min(first + 16, end) <= slot;
  if (has_keys && is_old) { load_keys(first); load_values(first); }
  let_successor_start();
  wait_for_predecessor();
#pragma unroll
  for (int i = 0; i < D / 64; ++i) {
    const int at = (i * 128 + threadIdx.x) * 8, head = at / D, h = kv_head * heads_per_kv + head;
    uint4 q = make_uint4(0, 0, 0, 0);
    if (head < heads_per_kv) q = rotated<BF, D, TWO_D>(a, token + (TWO_D ? h * 3 * D : h * D), at % D, position);
    *(uint4*)&query[head][at % D] = q;
  }
  if (begin <= slot && end == slot + 1 && threadIdx.x < D / 8) {  // this block stores the new key and value
    const u16* key = token + (TWO_D ? (kv_head * 3 + 1) * D : (a.num_heads + kv_head) * D);
    const u16* value = token + (TWO_D ? (kv_head * 3 + 2) * D : (a.num_heads + a.num_kv_heads + kv_head) * D);
    const int at = threadIdx.x * 8;
    *(uint4*)(a.keys + (cache + slot) * D + at) = rotated<BF, D, TWO_D>(a, key, at, position);
    *(uint4*)(a.values + (cache + slot) * D + at) = *(const uint4*)(value + at);
  }
  __syncthreads();
  u32 q0[D / 8], q1[D / 8];  // heads g and g + 8, elements t * D / 4 ...
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    q0[i] = ((const u32*)query[g])[t * D / 8 + i]; q1[i] = ((const u32*)query[g + 8])[t * D / 8 + i];
  }
  float acc[D / 8][4] = {}, top0 = -1e30f, top1 = -1e30f, sum0 = 0, sum1 = 0;
  if (has_keys && !is_old) { load_keys(first); load_values(first); }
  for (; first < end; first += 64) {
    float score[2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < D / 32; ++i) {
        const uint4 w = k[half * (D / 32) + i];
        mma<BF>(score[half], q0[4 * i], q1[4 * i], q0[4 * i + 1], q1[4 * i + 1], w.x, w.y);
        mma<BF>(score[half], q0[4 * i + 2], q1[4 * i + 2], q0[4 * i + 3], q1[4 * i + 3], w.z, w.w);
      }
    load_keys(first + 64);  // the registers are free: the next keys arrive behind the softmax
    // Online softmax: when a head's maximum grows, what was summed with the old one fades by exp(old - new).
    float new0 = top0, new1 = top1;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool seen = first + half * 8 + t * 2 + i % 2 < end;
        score[half][i] = seen ? score[half][i] * a.scaling : -__int_as_float(0x7F800000);
        if (i < 2) new0 = fmaxf(new0, score[half][i]); else new1 = fmaxf(new1, score[half][i]);
      }
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      new0 = fmaxf(new0, __shfl_xor_sync(~0u, new0, d)); new1 = fmaxf(new1, __shfl_xor_sync(~0u, new1, d));
    }
    const float fade0 = __expf(top0 - new0), fade1 = __expf(top1 - new1);
    top0 = new0; top1 = new1; sum0 *= fade0; sum1 *= fade1;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        score[half][i] = __expf(score[half][i] - (i < 2 ? top0 : top1));
        if (i < 2) sum0 += score[half][i]; else sum1 += score[half][i];
      }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) { acc[j][0] *= fade0; acc[j][1] *= fade0; acc[j][2] *= fade1; acc[j][3] *= fade1; }
    const u32 p0 = pair<BF>(score[0][0], score[0][1]), p1 = pair<BF>(score[0][2], score[0][3]);
    const u32 p2 = pair<BF>(score[1][0], score[1][1]), p3 = pair<BF>(score[1][2], score[1][3]);
#pragma unroll
    for (int j = 0; j < D / 64; ++j) {
      const uint4 r[4] = {v[j], v[D / 64 + j], v[2 * (D / 64) + j], v[3 * (D / 64) + j]};
#define PV(FIELD, TILE) \
  mma<BF>(acc[TILE], p0, p1, p2, p3, prmt(r[0].FIELD, r[1].FIELD, 0x5410), prmt(r[2].FIELD, r[3].FIELD, 0x5410)); \
  mma<BF>(acc[TILE + 1], p0, p1, p2, p3, prmt(r[0].FIELD, r[1].FIELD, 0x7632), prmt(r[2].FIELD, r[3].FIELD, 0x7632));
      PV(x, j * 8) PV(y, j * 8 + 2) PV(z, j * 8 + 4) PV(w, j * 8 + 6)
    }
    load_values(first + 64);
  }
#pragma unroll
  for (int d = 1; d < 4; d *= 2) { sum0 += __shfl_xor_sync(~0u, sum0, d); sum1 += __shfl_xor_sync(~0u, sum1, d); }
  if (t == 0) {
    maxima[warp][g] = top0; maxima[warp][g + 8] = top1; totals[warp][g] = sum0; totals[warp][g + 8] = sum1;
  }
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
    *(float2*)&context[warp][g][j * 8 + t * 2] = make_float2(acc[j][0], acc[j][1]);
    *(float2*)&context[warp][g + 8][j * 8 + t * 2] = make_float2(acc[j][2], acc[j][3]);
  }
  auto element_at = [](int place) { return place % 8 * (D / 8) + place / 8; };
  cluster_sync();
  const size_t pair_of = (size_t)b * a.num_kv_heads + kv_head;
  float* contexts = a.partial + pair_of * max_splits * 16 * D;                                    // [splits, 16, D]
  float* stats = a.partial + (size_t)gridDim.z * a.num_kv_heads * max_splits * 16 * D + pair_of * max_splits * 32;
  u16* out = a.out + (size_t)b * a.num_heads * D + kv_head * heads_per_kv * D;
  // A warp joins 64 elements of a head over the 4 * CLUSTER warps that saw keys; a lane knows the weight of one.
  for (int unit = rank * 4 + warp; unit < heads_per_kv * (D / 64); unit += CLUSTER * 4) {
    const int head = unit / (D / 64), place = unit % (D / 64) * 64 + lane * 2;
    float top = lane < 4 * CLUSTER ? read_from(&maxima[lane % 4][head], lane / 4) : -1e30f, total = 0;
    const float its_top = top;
    if (lane < 4 * CLUSTER) total = read_from(&totals[lane % 4][head], lane / 4);
    float2 part[4 * CLUSTER], sum = make_float2(0, 0);
#pragma unroll
    for (int s = 0; s < 4 * CLUSTER; ++s) part[s] = read_pair_from(&context[s % 4][head][place], s / 4);
#pragma unroll
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    const float weight = __expf(its_top - top);
    total *= weight;
#pragma unroll
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
#pragma unroll
    for (int s = 0; s < 4 * CLUSTER; ++s) {
      const float w = __shfl_sync(~0u, weight, s);
      sum.x += w * part[s].x; sum.y += w * part[s].y;
    }
    if (splits == 1) {
      out[head * D + element_at(place)] = from_float<BF>(sum.x / total);
      out[head * D + element_at(place + 1)] = from_float<BF>(sum.y / total);
    } else {
      *(float2*)&contexts[(split * 16 + head) * D + place] = sum;
      if (place == 0) { stats[split * 32 + head * 2] = top; stats[split * 32 + head * 2 + 1] = total; }
    }
  }
  if (CLUSTER > 1) cluster_sync();  // nobody leaves while its shared memory is read
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  // Whoever counts last joins the splits: all others have written theirs before they counted (threadfence).
  u32* counter = a.counters + pair_of;
  if (threadIdx.x == 0) is_last = atomicAdd(counter, 1u) == (u32)blocks - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  for (int head = warp; head < heads_per_kv; head += 4) {  // a warp per head: first the weight of each split
    float top = -1e30f, total = 0, mine = 0, weight = 0;
    float sum[D / 32] = {};
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, __ldcg(stats + s * 32 + head * 2));
#pragma unroll
    for (int d = 16; d; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
    for (int s0 = 0; s0 < splits; s0 += 32) {
      weight = 0;
      if (s0 + lane < splits) {
        weight = __expf(__ldcg(stats + (s0 + lane) * 32 + head * 2) - top);
        mine += weight * __ldcg(stats + (s0 + lane) * 32 + head * 2 + 1);
      }
      const int count = min(32, splits - s0);
#pragma unroll 8
      for (int s = 0; s < count; ++s) {
        const float w = __shfl_sync(~0u, weight, s);
        const float* part = contexts + ((s0 + s) * 16 + head) * D + lane * (D / 32);
        if (D == 128) {
          const float4 v = __ldcg((const float4*)part);
          sum[0] += w * v.x; sum[1] += w * v.y; sum[D / 32 - 2] += w * v.z; sum[D / 32 - 1] += w * v.w;
        } else {
          const float2 v = __ldcg((const float2*)part);
          sum[0] += w * v.x; sum[1] += w * v.y;
        }
      }
    }
    total = mine;
#pragma unroll
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) out[head * D + element_at(lane * (D / 32) + i)] = from_float<BF>(sum[i] / total);
  }
}
"""
