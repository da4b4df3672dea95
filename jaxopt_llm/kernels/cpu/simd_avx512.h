// Vectors of 16 lanes on AVX-512 with VNNI.
//
// Every simd_*.h gives the same names, each in its own translation unit; the kernels are written over them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "unroll.h"

namespace {
namespace simd {

// Into the second level: the first has too few lines to wait for memory with. Inlined, as GCC drops calls of a function
// that only prefetches: they have no effect.
JAXOPT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

constexpr const char* kName = "avx512_vnni";

// Rows that a tile may hold, largest first, and its panels. Of two panels by eight rows the sums of a block stay in
// registers, those of all blocks do not: they are read and written once a block, which costs less than to read an
// activation for each panel.
constexpr size_t kTileRows[] = {8, 4, 2, 1};
constexpr size_t kTilePanels = 2;
constexpr size_t kSumRows = 8;  // whose sums of a block stay in registers
// Vectors beside six rows in a tile of attention.
constexpr size_t kTileVectors = 4;

using F32 = __m512;
using I32 = __m512i;

inline F32 zero() { return _mm512_setzero_ps(); }
inline F32 broadcast(float x) { return _mm512_set1_ps(x); }
inline I32 broadcast(int32_t x) { return _mm512_set1_epi32(x); }
inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
inline F32 load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline F32 load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

// As `load`; the compiler does not load again at each use.
inline F32 load_once(const float* p) {
  F32 x = load(p);
  asm("" : "+v"(x));
  return x;
}
inline F32 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// Lanes from `begin` up to `end` of `x`, the others of `other`.
inline F32 keep(F32 x, int begin, int end, F32 other) {
  return _mm512_mask_blend_ps(((1u << end) - 1) & ~((1u << begin) - 1), other, x);
}

inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
// x / d, rounded as a division rounds, for many x: the remainder corrects the product with the rounded 1 / d
// (Markstein, IBM J. Res. Dev. 34, 1990).
inline F32 divide(F32 x, F32 d, F32 inverse) {
  const F32 quotient = mul(x, inverse);
  return fma(_mm512_fnmadd_ps(quotient, d, x), inverse, quotient);
}
// Where one is NaN these give `b`.
inline F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
inline F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline float reduce_add(F32 x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(F32 x) { return _mm512_reduce_max_ps(x); }

inline F32 to_float(I32 x) { return _mm512_cvtepi32_ps(x); }
inline I32 round(F32 x) { return _mm512_cvtps_epi32(x); }  // half to even
inline F32 times_power_of_two(F32 x, I32 n) { return _mm512_scalef_ps(x, _mm512_cvtepi32_ps(n)); }

inline I32 add(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
inline I32 clip(I32 x, int32_t limit) {
  return _mm512_max_epi32(_mm512_min_epi32(x, broadcast(limit)), broadcast(-limit));
}
inline int32_t reduce_add(I32 x) { return _mm512_reduce_add_epi32(x); }
// The larger of |x| and |y|. Integers order as the magnitudes they spell, and so NaN is the largest.
inline F32 max_magnitude(F32 x, F32 y) {
  const I32 mask = broadcast(0x7fffffff);
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(x), mask),
                                              _mm512_and_si512(_mm512_castps_si512(y), mask)));
}
inline float reduce_magnitudes(F32 x) {  // of `max_magnitude`
  const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(x));
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
// The lanes' low bytes.
inline void store_bytes(int8_t* p, I32 x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }

// 64 codes: four inputs of 16 outputs.
struct Codes {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
struct Nibbles {
  __m512i v;
};

inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes bytes(Codes c) { return {c.v}; }
inline Nibbles nibbles(Codes c) { return {c.v}; }
inline void store_codes(uint8_t* p, Nibbles w) { _mm512_storeu_si512(p, w.v); }
inline Nibbles low_nibbles(Codes c) { return {_mm512_and_si512(c.v, _mm512_set1_epi8(0xf))}; }
inline Nibbles high_nibbles(Codes c) {
  return {_mm512_and_si512(_mm512_srli_epi16(c.v, 4), _mm512_set1_epi8(0xf))};
}

// What `dot` of bytes sees in place of the code 0.
constexpr int32_t kByteZero = 128;

// Four activations, in every lane.
struct Four {
  __m512i v;
};
inline Four four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return {broadcast(four)};
}
// What the dots of a block with such codes are added to. An instruction set may have narrower sums for some: then it is
// in the end that `start` is added.
template <class Weights>
using Sum = I32;
inline void begin(I32& sum, int32_t start) { sum = broadcast(start); }
inline I32 end(I32 sum, int32_t) { return sum; }
// Each lane adds the products of its four codes with the four activations.
inline I32 dot(I32 sum, Bytes w, Four x) { return _mm512_dpbusd_epi32(sum, w.v, x.v); }
inline I32 dot(I32 sum, Nibbles w, Four x) { return _mm512_dpbusd_epi32(sum, w.v, x.v); }
// `dot` is one instruction: three take less time than to widen four codes and multiply each.
constexpr bool kDigits = true;

}  // namespace simd
}  // namespace
