// Vectors from and to memory in another type, over any simd_*.h.
#pragma once

#include "linear.h"

namespace {

using jaxopt::Floats;
using jaxopt::FloatType;
using jaxopt::kLanes;

JAXOPT_INLINE F32 load_floats(Floats from, size_t vector) {
  const size_t at = vector * kLanes;
  switch (from.type) {
    case FloatType::kF16: return simd::load_f16(static_cast<const uint16_t*>(from.data) + at);
    case FloatType::kBF16: return simd::load_bf16(static_cast<const uint16_t*>(from.data) + at);
    default: return simd::load(static_cast<const float*>(from.data) + at);
  }
}

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// To `to[at]` and what follows; float32 or bfloat16.
inline void store_floats(void* to, FloatType type, size_t at, F32 x) {
  if (type == FloatType::kF32) return simd::store(static_cast<float*>(to) + at, x);
  float lanes[kLanes];
  simd::store(lanes, x);
  for (size_t i = 0; i < kLanes; ++i) static_cast<uint16_t*>(to)[at + i] = to_bf16(lanes[i]);
}

}  // namespace
