// The tile instructions as functions, twice: on the hardware, and as a software model with the same semantics
// for machines without it (KT_AMX_MODEL), so that gemm_amx.cpp is tested everywhere. Used by gemm_amx.cpp
// only.
#pragma once

#include <cstdint>

namespace kt {
namespace {

// What ldtilecfg reads: palette 1 has 8 tiles of at most 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

#ifdef KT_AMX_MODEL

struct ModelTile {
  alignas(64) uint8_t bytes[16][64];
};
thread_local TileConfig model_config;
thread_local ModelTile model_tiles[8];

inline void tiles_configure(const TileConfig& config) {
  model_config = config;
  __builtin_memset(model_tiles, 0, sizeof(model_tiles));
}
inline void tiles_release() { __builtin_memset(&model_config, 0, sizeof(model_config)); }

template <int kTile>
inline void tile_zero() {
  __builtin_memset(&model_tiles[kTile], 0, sizeof(ModelTile));
}

// Rows beyond the configured ones become zero, as the hardware has it.
template <int kTile>
inline void tile_load(const void* base, int64_t stride) {
  tile_zero<kTile>();
  for (int row = 0; row < model_config.rows[kTile]; ++row) {
    __builtin_memcpy(model_tiles[kTile].bytes[row], static_cast<const uint8_t*>(base) + row * stride,
                     model_config.row_bytes[kTile]);
  }
}

template <int kTile>
inline void tile_store(void* base, int64_t stride) {
  for (int row = 0; row < model_config.rows[kTile]; ++row) {
    __builtin_memcpy(static_cast<uint8_t*>(base) + row * stride, model_tiles[kTile].bytes[row],
                     model_config.row_bytes[kTile]);
  }
}

inline float model_bf16(const uint8_t* bytes) {
  uint16_t half;
  __builtin_memcpy(&half, bytes, 2);
  if ((half & 0x7f80u) == 0) half &= 0x8000u;  // the hardware takes denormals as zero
  const uint32_t word = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

// c[m][n] += sum over pairs k of a[m][2k] * b[k][2n] + a[m][2k+1] * b[k][2n+1]
template <int kC, int kA, int kB>
inline void tile_dot_bf16() {
  for (int m = 0; m < model_config.rows[kC]; ++m) {
    for (int k = 0; k < model_config.row_bytes[kA] / 4; ++k) {
      for (int n = 0; n < model_config.row_bytes[kC] / 4; ++n) {
        float sum;
        __builtin_memcpy(&sum, &model_tiles[kC].bytes[m][4 * n], 4);
        for (int i = 0; i < 2; ++i) {
          sum += model_bf16(&model_tiles[kA].bytes[m][4 * k + 2 * i]) *
                 model_bf16(&model_tiles[kB].bytes[k][4 * n + 2 * i]);
        }
        __builtin_memcpy(&model_tiles[kC].bytes[m][4 * n], &sum, 4);
      }
    }
  }
}

// The same with four bytes per step and int32 sums; a is signed, b is not.
template <int kC, int kA, int kB>
inline void tile_dot_bytes() {
  for (int m = 0; m < model_config.rows[kC]; ++m) {
    for (int k = 0; k < model_config.row_bytes[kA] / 4; ++k) {
      for (int n = 0; n < model_config.row_bytes[kC] / 4; ++n) {
        int32_t sum;
        __builtin_memcpy(&sum, &model_tiles[kC].bytes[m][4 * n], 4);
        for (int i = 0; i < 4; ++i) {
          const auto a = static_cast<int8_t>(model_tiles[kA].bytes[m][4 * k + i]);
          const uint8_t b = model_tiles[kB].bytes[k][4 * n + i];
          sum += a * b;
        }
        __builtin_memcpy(&model_tiles[kC].bytes[m][4 * n], &sum, 4);
      }
    }
  }
}

#else

// Inline assembly, because the compiler's intrinsics take tile numbers as literal text, not as template
// arguments.
inline void tiles_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void tiles_release() { asm volatile("tilerelease" ::); }

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* base, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
template <int kC, int kA, int kB>
inline void tile_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#endif

}  // namespace
}  // namespace kt
