// What a translation unit compiled for one instruction set offers, and which of them runs.
#pragma once

#include "attention.h"
#include "linear.h"
#include "norm.h"

namespace jaxopt {

struct Kernels {
  const char* name;
  LinearKernels linear;
  AttentionKernels attention;
  NormKernels norm;
};

// Null where this machine cannot run it, or it was not built.
const Kernels* amx_kernels();  // where those for AVX-512 run
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The fastest that this machine can run, or what was chosen.
const Kernels& kernels();

}  // namespace jaxopt
