// Root-mean-square norm, over any simd_*.h. A row is summed in the same order whatever rows stand beside it.
#pragma once

#include "floats.h"
#include "norm.h"

namespace {

void normalise(const jaxopt::NormArgs& args, size_t first_row, size_t end_row) {
  const size_t vectors = args.width / kLanes;
  for (size_t row = first_row; row < end_row; ++row) {
    const size_t first = row * vectors;
    F32 squares = simd::zero();
    for (size_t i = 0; i < vectors; ++i) {
      const F32 x = load_floats(args.x, first + i);
      squares = simd::fma(x, x, squares);
    }
    const float mean = simd::reduce_add(squares) / static_cast<float>(args.width);
    const F32 inverse = simd::broadcast(1.0f / sqrtf(mean + args.eps));
    for (size_t i = 0; i < vectors; ++i) {
      const F32 normal = simd::mul(load_floats(args.x, first + i), inverse);
      store_floats(args.y, args.x.type, (first + i) * kLanes, simd::mul(normal, simd::load(args.gain + i * kLanes)));
    }
  }
}

inline jaxopt::NormKernels norm_kernels() { return {normalise}; }

}  // namespace
