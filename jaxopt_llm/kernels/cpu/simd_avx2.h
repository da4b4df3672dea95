// Vectors of 16 lanes on AVX2 with FMA and F16C: pairs of registers. See simd_avx512.h.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "unroll.h"

namespace {
namespace simd {

JAXOPT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

constexpr const char* kName = "avx2";
// Eight rows wait for their weights together: four would take less time than reading them, and four more none of it.
constexpr size_t kTileRows[] = {8, 4, 2, 1};
constexpr size_t kTilePanels = 1;
constexpr size_t kSumRows = 4;
constexpr size_t kTileVectors = 1;

struct F32 {
  __m256 a, b;
};
struct I32 {
  __m256i a, b;
};

inline F32 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I32 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F32 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline __m128i load_eight_halves(const uint16_t* p) { return _mm_loadu_si128((const __m128i*)p); }
inline F32 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_eight_halves(p)), _mm256_cvtph_ps(load_eight_halves(p + 8))};
}
inline __m256 widen_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight_halves(p)), 16));
}
inline F32 load_bf16(const uint16_t* p) { return {widen_bf16(p), widen_bf16(p + 8)}; }

inline F32 load_once(const float* p) {
  F32 x = load(p);
  asm("" : "+x"(x.a), "+x"(x.b));
  return x;
}
inline __m256 widen_i8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline F32 load_i8(const int8_t* p) { return {widen_i8(p), widen_i8(p + 8)}; }
inline __m256 keep(__m256 x, int begin, int end, __m256 other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                                          _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(end - 1)));
  return _mm256_blendv_ps(x, other, _mm256_castsi256_ps(outside));
}
inline F32 keep(F32 x, int begin, int end, F32 other) {
  return {keep(x.a, begin, end, other.a), keep(x.b, begin - 8, end - 8, other.b)};
}

inline F32 add(F32 x, F32 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F32 sub(F32 x, F32 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F32 mul(F32 x, F32 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F32 div(F32 x, F32 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F32 fma(F32 x, F32 y, F32 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F32 divide(F32 x, F32 d, F32 inverse) {
  const F32 quotient = mul(x, inverse);
  const F32 remainder = {_mm256_fnmadd_ps(quotient.a, d.a, x.a), _mm256_fnmadd_ps(quotient.b, d.b, x.b)};
  return fma(remainder, inverse, quotient);
}
inline F32 min(F32 x, F32 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F32 max(F32 x, F32 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline float reduce_add(F32 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float reduce_max(F32 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline F32 to_float(I32 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I32 round(F32 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline F32 times_power_of_two(F32 x, I32 n) { return mul(x, {power_of_two(n.a), power_of_two(n.b)}); }

inline I32 add(I32 x, I32 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline __m256i clip(__m256i x, int32_t limit) {
  return _mm256_max_epi32(_mm256_min_epi32(x, _mm256_set1_epi32(limit)), _mm256_set1_epi32(-limit));
}
inline I32 clip(I32 x, int32_t limit) { return {clip(x.a, limit), clip(x.b, limit)}; }
inline int32_t reduce_add(I32 x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline __m256 max_magnitude(__m256 x, __m256 y) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(x), mask),
                                              _mm256_and_si256(_mm256_castps_si256(y), mask)));
}
inline F32 max_magnitude(F32 x, F32 y) { return {max_magnitude(x.a, y.a), max_magnitude(x.b, y.b)}; }
inline float reduce_magnitudes(F32 x) {
  const __m256i eight = _mm256_max_epi32(_mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(four));
}
inline void store_bytes(int8_t* p, I32 x) {  // the lanes fit in a byte
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(low, high));
}

struct Codes {
  __m256i a, b;
};
// Signed codes beside their magnitudes: the product of unsigned with signed bytes saturates beyond 128 x 127 x 2.
struct Bytes {
  __m256i a, b, magnitude_a, magnitude_b;
};
struct Nibbles {
  __m256i a, b;
};

inline Codes load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Bytes bytes(Codes c) {
  const __m256i sign = _mm256_set1_epi8(-128);
  const __m256i a = _mm256_xor_si256(c.a, sign), b = _mm256_xor_si256(c.b, sign);
  return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
}
inline Nibbles nibbles(Codes c) { return {c.a, c.b}; }
inline void store_codes(uint8_t* p, Nibbles w) {
  _mm256_storeu_si256((__m256i*)p, w.a);
  _mm256_storeu_si256((__m256i*)(p + 32), w.b);
}
inline Nibbles low_nibbles(Codes c) {
  const __m256i mask = _mm256_set1_epi8(0xf);
  return {_mm256_and_si256(c.a, mask), _mm256_and_si256(c.b, mask)};
}
inline Nibbles high_nibbles(Codes c) {
  return low_nibbles({_mm256_srli_epi16(c.a, 4), _mm256_srli_epi16(c.b, 4)});
}

constexpr int32_t kByteZero = 0;

struct Four {
  __m256i v;
};
inline Four four_inputs(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof four);
  return {_mm256_set1_epi32(four)};
}
template <class Weights>
struct SumOf {
  using Type = I32;
};
// The products of two inputs, in 16 bits: 15 x 127 x 2 of up to 8 dots fit, as a block has.
struct Pairs {
  __m256i a, b;
};
template <>
struct SumOf<Nibbles> {
  using Type = Pairs;
};
template <class Weights>
using Sum = typename SumOf<Weights>::Type;

inline __m256i add_pairs(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
inline void begin(I32& sum, int32_t start) { sum = broadcast(start); }
inline I32 end(I32 sum, int32_t) { return sum; }
inline void begin(Pairs& sum, int32_t) { sum = {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I32 end(Pairs sum, int32_t start) { return add(broadcast(start), {add_pairs(sum.a), add_pairs(sum.b)}); }

// `sum`, here and now: else the compiler adds a block's products as a tree, for which it stores each of them.
template <class Sum>
inline Sum summed(Sum sum) {
  asm("" : "+x"(sum.a), "+x"(sum.b));
  return sum;
}
inline I32 dot(I32 sum, Bytes w, Four x) {
  const __m256i a = _mm256_maddubs_epi16(w.magnitude_a, _mm256_sign_epi8(x.v, w.a));
  const __m256i b = _mm256_maddubs_epi16(w.magnitude_b, _mm256_sign_epi8(x.v, w.b));
  return summed(add(sum, {add_pairs(a), add_pairs(b)}));
}
inline Pairs dot(Pairs sum, Nibbles w, Four x) {
  return summed(Pairs{_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x.v)),
                      _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x.v))});
}

constexpr bool kDigits = false;
// The code of input `j` of four, less `zero`, exact.
inline __m256 signed_code(__m256i v, int j) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * j), 24));
}
inline F32 code(Bytes w, int j, int32_t) { return {signed_code(w.a, j), signed_code(w.b, j)}; }
inline F32 code(Nibbles w, int j, int32_t zero) {
  const __m256 offset = _mm256_set1_ps(zero);
  return {_mm256_sub_ps(signed_code(w.a, j), offset), _mm256_sub_ps(signed_code(w.b, j), offset)};
}

}  // namespace simd
}  // namespace
