// Tile registers of AMX, beside the vectors of simd_avx512.h. One holds up to 16 rows of 64 bytes.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "simd_avx512.h"

namespace {
namespace amx {

constexpr size_t kRows = 16;
constexpr size_t kRowBytes = 64;

// The shape of each register, for one thread and as long as this lives. First come `count` sums, 16 rows of 16 outputs;
// then as many of activations, 16 rows of so many inputs; then one of weights, four inputs of 16 outputs a row.
class Shapes {
 public:
  Shapes(int count, size_t inputs) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&config](int tile, size_t rows, size_t row_bytes) {
      config.rows[tile] = static_cast<uint8_t>(rows);
      config.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    };
    for (int i = 0; i < count; ++i) {
      set(i, kRows, kRowBytes);
      set(count + i, kRows, inputs);
    }
    set(2 * count, inputs / 4, kRowBytes);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Shapes() { asm volatile("tilerelease"); }
  Shapes(const Shapes&) = delete;
  Shapes& operator=(const Shapes&) = delete;
};

// Not the compiler's intrinsics: they take no constant but a literal and, in GCC 12, may read before memory is written.
template <int kTile>
JAXOPT_INLINE void clear() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
JAXOPT_INLINE void load(const void* rows, size_t stride) {
  asm volatile("tileloadd (%1,%2), %%tmm%c0" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
}
template <int kTile>
JAXOPT_INLINE void store(void* rows, size_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2)" ::"i"(kTile), "r"(rows), "r"(stride) : "memory");
}
// Adds the products of signed bytes to sums.
template <int kSums, int kLeft, int kRight>
JAXOPT_INLINE void multiply() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// Linux gives the registers to a process that asks, once.
inline bool permitted() {
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace amx

namespace simd {

inline I32 load(const int32_t* p) { return _mm512_loadu_si512(p); }
// Signed bytes of codes that are stored with `zero` added.
inline Nibbles without(Nibbles w, int32_t zero) {
  return {_mm512_sub_epi8(w.v, _mm512_set1_epi8(static_cast<char>(zero)))};
}

}  // namespace simd
}  // namespace
