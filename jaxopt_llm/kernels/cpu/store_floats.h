// Vectors to memory in another type, over any simd_*.h. `load_floats` is the way back.
#pragma once

#include "linear.h"

namespace {

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// To `to[at]` and what follows; float32 or bfloat16.
inline void store_floats(void* to, jaxopt::FloatType type, size_t at, F32 x) {
  if (type == jaxopt::FloatType::kF32) return simd::store(static_cast<float*>(to) + at, x);
  float lanes[jaxopt::kLanes];
  simd::store(lanes, x);
  for (size_t i = 0; i < jaxopt::kLanes; ++i) static_cast<uint16_t*>(to)[at + i] = to_bf16(lanes[i]);
}

}  // namespace
