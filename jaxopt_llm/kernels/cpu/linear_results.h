// From the sums of panels to results, over any simd_*.h.
#pragma once

#include "linear.h"

namespace {

using jaxopt::Gate;
using jaxopt::kLanes;
using jaxopt::LinearArgs;

// What a tile gives for a panel: 16 outputs of each row.
using Sums = float[jaxopt::kMostRows][kLanes];

inline F32 activation(Gate gate, F32 x) {
  switch (gate) {
    case Gate::kSilu: return silu(x);
    case Gate::kGelu: return gelu(x);
    case Gate::kGeluTanh: return gelu_tanh(x);
    default: return x;
  }
}

inline F32 with_bias(const LinearArgs& args, size_t panel, const float* sums) {
  const F32 sum = simd::load(sums);
  return args.bias == nullptr ? sum : simd::add(sum, simd::load(args.bias + panel * kLanes));
}

// Sixteen outputs of one row, from the sums of one panel or of a gate and its up panel.
inline void finish(const LinearArgs& args, size_t group, size_t row, const float* first, const float* second) {
  F32 result = with_bias(args, group * args.panels_per_group(), first);
  if (args.gate != Gate::kNone) {
    result = simd::mul(activation(args.gate, result), with_bias(args, 2 * group + 1, second));
  }
  float* y = args.y + row * args.outputs + group * kLanes;
  const size_t left = args.outputs - group * kLanes;
  if (left >= kLanes) return simd::store(y, result);
  float lanes[kLanes];
  simd::store(lanes, result);
  std::memcpy(y, lanes, left * sizeof(float));
}

// Of a tile of rows, from the sums of the panels of some groups.
inline void finish_tile(const LinearArgs& args, size_t first_group, size_t groups, size_t base, size_t height,
                        const Sums* sums) {
  const size_t per_group = args.panels_per_group();
  for (size_t g = 0; g < groups; ++g) {
    const Sums* own = sums + g * per_group;
    for (size_t r = 0; r < height; ++r) finish(args, first_group + g, base + r, own[0][r], own[per_group - 1][r]);
  }
}

}  // namespace
