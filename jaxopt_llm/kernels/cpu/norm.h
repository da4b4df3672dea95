// Root-mean-square norm of rows: what its parts tell each other.
#pragma once

#include <cstddef>

#include "linear.h"

namespace jaxopt {

struct NormArgs {
  Floats x;  // [rows, width]
  size_t rows, width;
  const float* gain;  // [width]
  float eps;
  void* y;  // as x
};

// The part that is compiled for each instruction set.
struct NormKernels {
  void (*normalise)(const NormArgs&, size_t first_row, size_t end_row);
};

}  // namespace jaxopt
