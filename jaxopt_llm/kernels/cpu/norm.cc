// The XLA call `jaxopt_rms_norm`: shares rows among the threads.
#include "norm.h"

#include <algorithm>

#include "kernels.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace jaxopt {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kChunkValues = 1 << 14;  // that a thread takes at once

// Shapes and types are checked where the call is made, in Python.
ffi::Error rms_norm(ffi::AnyBuffer x, ffi::Buffer<ffi::F32> gain, ffi::Result<ffi::AnyBuffer> y, float eps) {
  NormArgs args{};
  args.x = {x.untyped_data(), x.element_type() == ffi::BF16 ? FloatType::kBF16 : FloatType::kF32};
  args.rows = x.dimensions()[0];
  args.width = x.dimensions()[1];
  args.gain = gain.typed_data();
  args.eps = eps;
  args.y = y->untyped_data();

  const NormKernels& kernels = jaxopt::kernels().norm;
  const size_t height = std::max<size_t>(1, kChunkValues / args.width);
  parallel_for((args.rows + height - 1) / height, [&](size_t chunk) {
    kernels.normalise(args, chunk * height, std::min(args.rows, (chunk + 1) * height));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxopt

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxopt_rms_norm, jaxopt::rms_norm,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()               // x [rows, width]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // gain [width]
                                  .Ret<xla::ffi::AnyBuffer>()               // y, as x
                                  .Attr<float>("eps"));
