// Functions of whole vectors, over any simd_*.h.
#pragma once

#include <math.h>

namespace {

using simd::F32;
using simd::I32;

// exp to 2 ulp, for any x: below -87 nearly 0, above 88 the largest there is. As Cephes' expf: x = n ln 2 + r.
inline F32 exp(F32 x) {
  x = simd::max(simd::broadcast(-87.0f), simd::min(simd::broadcast(88.0f), x));
  const I32 n = simd::round(simd::mul(x, simd::broadcast(1.44269504f)));
  const F32 whole = simd::to_float(n);
  F32 r = simd::fma(whole, simd::broadcast(-0.693359375f), x);
  r = simd::fma(whole, simd::broadcast(2.12194440e-4f), r);
  constexpr float kCoefficients[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                     5.0000001201e-1f};
  F32 p = simd::broadcast(1.9875691500e-4f);
  for (float c : kCoefficients) p = simd::fma(p, r, simd::broadcast(c));
  p = simd::add(simd::fma(p, simd::mul(r, r), r), simd::broadcast(1.0f));
  return simd::times_power_of_two(p, n);
}

inline F32 sigmoid(F32 x) {
  const F32 one = simd::broadcast(1.0f);
  return simd::div(one, simd::add(one, exp(simd::sub(simd::zero(), x))));
}

inline F32 silu(F32 x) { return simd::mul(x, sigmoid(x)); }

// 0.5 (1 + tanh u) is the sigmoid of 2u.
inline F32 gelu_tanh(F32 x) {
  const F32 cubic = simd::fma(simd::mul(simd::mul(x, x), x), simd::broadcast(0.044715f), x);
  return simd::mul(x, sigmoid(simd::mul(simd::broadcast(1.5957691216f), cubic)));
}

inline F32 gelu(F32 x) {
  float lanes[16];
  simd::store(lanes, x);
  for (float& lane : lanes) lane *= 0.5f * erfcf(lane * -0.70710678f);
  return simd::load(lanes);
}

}  // namespace
