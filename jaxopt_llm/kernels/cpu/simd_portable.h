// Vectors of 16 lanes in plain C++, for the compiler to vectorise. See simd_avx512.h.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#define JAXOPT_INLINE inline
#define JAXOPT_UNROLL  // the lanes are loops themselves: more would only take the compiler's time

namespace {
namespace simd {

inline void prefetch(const void*) {}

constexpr const char* kName = "portable";
constexpr size_t kTileRows[] = {4, 1};
constexpr size_t kTilePanels = 1;
constexpr size_t kSumRows = 4;
constexpr size_t kTileVectors = 1;
constexpr int kLanes = 16;

struct F32 {
  float v[kLanes];
};
struct I32 {
  int32_t v[kLanes];
};

// result[i] = f(i) for every lane.
template <class Vector, class Function>
inline Vector lanes(Function f) {
  Vector result;
  for (int i = 0; i < kLanes; ++i) result.v[i] = f(i);
  return result;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float widen_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return from_bits(sign | 0x7f800000u | magnitude << 13);
  if (magnitude >= 0x0400u) return from_bits(sign | (magnitude + (112u << 10)) << 13);
  return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));  // a subnormal half
}

inline F32 broadcast(float x) {
  return lanes<F32>([=](int) { return x; });
}
inline I32 broadcast(int32_t x) {
  return lanes<I32>([=](int) { return x; });
}
inline F32 zero() { return broadcast(0.0f); }
inline F32 load(const float* p) {
  return lanes<F32>([=](int i) { return p[i]; });
}
inline void store(float* p, F32 x) { std::memcpy(p, x.v, sizeof x.v); }
inline F32 load_f16(const uint16_t* p) {
  return lanes<F32>([=](int i) { return widen_f16(p[i]); });
}
inline F32 load_bf16(const uint16_t* p) {
  return lanes<F32>([=](int i) { return from_bits(uint32_t{p[i]} << 16); });
}

inline F32 load_once(const float* p) { return load(p); }
inline F32 load_i8(const int8_t* p) {
  return lanes<F32>([=](int i) { return static_cast<float>(p[i]); });
}
inline F32 keep(const F32& x, int begin, int end, const F32& other) {
  return lanes<F32>([&](int i) { return begin <= i && i < end ? x.v[i] : other.v[i]; });
}

inline F32 add(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32 sub(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32 mul(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32 div(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32 fma(const F32& a, const F32& b, const F32& c) {
#ifdef __FP_FAST_FMAF
  return lanes<F32>([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
  return lanes<F32>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
}
inline F32 divide(const F32& x, const F32& d, const F32&) { return div(x, d); }
inline F32 min(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32 max(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline float reduce_add(const F32& x) {
  float sum = 0;
  for (float lane : x.v) sum += lane;
  return sum;
}
inline float reduce_max(const F32& x) {
  float top = x.v[0];
  for (float lane : x.v) top = top > lane ? top : lane;
  return top;
}

inline F32 to_float(const I32& x) {
  return lanes<F32>([&](int i) { return static_cast<float>(x.v[i]); });
}
inline I32 round(const F32& x) {  // of magnitudes under 2^22: the sum's last bit is worth one
  const float magic = 0x1.8p23f;
  return lanes<I32>([&](int i) { return static_cast<int32_t>(to_bits(x.v[i] + magic) - to_bits(magic)); });
}
inline F32 times_power_of_two(const F32& x, const I32& n) {
  return lanes<F32>([&](int i) { return x.v[i] * from_bits(static_cast<uint32_t>(n.v[i] + 127) << 23); });
}

inline I32 add(const I32& a, const I32& b) {
  return lanes<I32>([&](int i) { return a.v[i] + b.v[i]; });
}
inline I32 clip(const I32& x, int32_t limit) {
  return lanes<I32>([&](int i) { return x.v[i] > limit ? limit : x.v[i] < -limit ? -limit : x.v[i]; });
}
inline int32_t reduce_add(const I32& x) {
  int32_t sum = 0;
  for (int32_t lane : x.v) sum += lane;
  return sum;
}
inline F32 max_magnitude(const F32& a, const F32& b) {
  return lanes<F32>([&](int i) {
    const uint32_t x = to_bits(a.v[i]) & 0x7fffffffu, y = to_bits(b.v[i]) & 0x7fffffffu;
    return from_bits(x > y ? x : y);
  });
}
inline float reduce_magnitudes(const F32& x) {
  uint32_t top = 0;
  for (float lane : x.v) top = top > to_bits(lane) ? top : to_bits(lane);
  return from_bits(top);
}
inline void store_bytes(int8_t* p, const I32& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}

struct Codes {
  uint8_t v[4 * kLanes];
};
struct Bytes {
  int8_t v[4 * kLanes];
};
struct Nibbles {
  int8_t v[4 * kLanes];
};

// result[i] = f(codes[i]) for every code.
template <class Result, class Function>
inline Result each_code(const Codes& c, Function f) {
  Result result;
  for (int i = 0; i < 4 * kLanes; ++i) result.v[i] = static_cast<int8_t>(f(c.v[i]));
  return result;
}
inline Codes load_codes(const uint8_t* p) {
  Codes c;
  std::memcpy(c.v, p, sizeof c.v);
  return c;
}
inline Bytes bytes(const Codes& c) {
  return each_code<Bytes>(c, [](int u) { return u - 128; });
}
inline Nibbles nibbles(const Codes& c) {
  return each_code<Nibbles>(c, [](int u) { return u; });
}
inline void store_codes(uint8_t* p, const Nibbles& w) { std::memcpy(p, w.v, sizeof w.v); }
inline Nibbles low_nibbles(const Codes& c) {
  return each_code<Nibbles>(c, [](int u) { return u & 0xf; });
}
inline Nibbles high_nibbles(const Codes& c) {
  return each_code<Nibbles>(c, [](int u) { return u >> 4; });
}

constexpr int32_t kByteZero = 0;

struct Four {
  int8_t v[4];
};
inline Four four_inputs(const int8_t* x) { return {{x[0], x[1], x[2], x[3]}}; }
template <class Weights>
using Sum = I32;
inline void begin(I32& sum, int32_t start) { sum = broadcast(start); }
inline I32 end(const I32& sum, int32_t) { return sum; }
template <class Weights>
inline I32 dot(const I32& sum, const Weights& w, Four x) {
  return lanes<I32>([&](int i) {
    const int8_t* four = w.v + 4 * i;
    return sum.v[i] + four[0] * x.v[0] + four[1] * x.v[1] + four[2] * x.v[2] + four[3] * x.v[3];
  });
}

constexpr bool kDigits = false;
inline F32 code(const Bytes& w, int j, int32_t) {
  return lanes<F32>([&](int i) { return static_cast<float>(w.v[4 * i + j]); });
}
inline F32 code(const Nibbles& w, int j, int32_t zero) {
  return lanes<F32>([&](int i) { return static_cast<float>(w.v[4 * i + j] - zero); });
}

}  // namespace simd
}  // namespace
