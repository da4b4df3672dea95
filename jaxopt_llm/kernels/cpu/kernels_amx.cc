// Products of many rows of digits on AMX, all else as on AVX-512. See kernels_avx512.cc for what must not be used here.
#include "kernels.h"

#ifdef __AMX_INT8__
#include "simd_amx.h"
#include "vector_math.h"
// The kernels follow their vectors.
#include "linear_matrices.h"

namespace {

const jaxopt::LinearKernels& vectors() { return jaxopt::avx512_kernels()->linear; }

// A rounded block's sums become floats one by one, which takes vectors longer while the unit moves its registers: it
// gains next to nothing.
size_t stripe(const LinearArgs& args) {
  return args.round || args.block != kBlock ? vectors().stripe(args) : kStripe;
}

// Rows that fill no stripe are left to vectors.
void multiply(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group, size_t first_stripe,
              size_t last_stripe, uint8_t* unpacked) {
  if (args.stripe == kStripe) {
    const size_t whole = args.rows / kStripe, end = whole < last_stripe ? whole : last_stripe;
    if (first_stripe < end) multiply_stripes(args, tiles, first_group, last_group, first_stripe, end, unpacked);
    first_stripe = end;
  }
  if (first_stripe < last_stripe) {
    vectors().multiply(args, tiles, first_group, last_group, first_stripe, last_stripe, unpacked);
  }
}

}  // namespace

namespace jaxopt {

const Kernels* amx_kernels() {
  static const bool permitted = amx::permitted();
  static const Kernels kernels = [] {
    Kernels result = *avx512_kernels();
    result.name = "amx";
    result.linear.stripe = stripe;
    result.linear.multiply = multiply;
    return result;
  }();
  return permitted ? &kernels : nullptr;
}

}  // namespace jaxopt
#else
const jaxopt::Kernels* jaxopt::amx_kernels() { return nullptr; }
#endif
