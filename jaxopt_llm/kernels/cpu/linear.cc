// The XLA call `jaxopt_linear`: shares the work of one product among the threads.
#include "linear.h"

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace jaxopt {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kRoundAlone = 1 << 14;     // activations that are not worth a second thread
constexpr size_t kMultiplyAlone = 1 << 16;  // multiplications likewise
constexpr size_t kChunkBytes = 1 << 15;     // weights that a thread takes at once
constexpr size_t kChunkInputs = 1 << 19;    // activations that its second-level cache has room for

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

Tiles make_tiles(const LinearArgs& args) {
  thread_local Scratch scratch;
  const size_t values = args.rows * args.inputs, blocks = args.rows * args.blocks();
  char* memory = scratch.reserve(values * (args.round ? 1 : sizeof(float)) + 3 * blocks * sizeof(float));
  Tiles tiles{};
  tiles.scale = reinterpret_cast<float*>(memory);
  tiles.sum = tiles.scale + blocks;
  tiles.start = reinterpret_cast<int32_t*>(tiles.sum + blocks);
  char* rest = memory + 3 * blocks * sizeof(float);
  if (args.round) {
    tiles.codes = reinterpret_cast<int8_t*>(rest);
  } else {
    tiles.values = reinterpret_cast<float*>(rest);
  }
  return tiles;
}

void prepare(const LinearKernels& kernels, const LinearArgs& args, const Tiles& tiles) {
  const size_t stripes = ceil_div(args.rows, kernels.stripe);
  const auto stripe = [&](size_t index) { kernels.prepare(args, tiles, index); };
  if (args.rows * args.inputs > kRoundAlone) return parallel_for(stripes, stripe);
  for (size_t index = 0; index < stripes; ++index) stripe(index);
}

// Chunks are a few groups of outputs by many rows: their weights stay in cache while the rows pass.
void multiply(const LinearKernels& kernels, const LinearArgs& args, const Tiles& tiles) {
  const size_t groups = args.panels / args.panels_per_group();
  const size_t stripes = ceil_div(args.rows, kernels.stripe);
  if (args.rows * args.panels * kLanes * args.inputs <= kMultiplyAlone) {
    return kernels.multiply(args, tiles, 0, groups, 0, stripes);
  }
  const size_t group_bytes = args.panels_per_group() * kLanes * args.inputs * args.bits / 8;
  const size_t width = kChunkBytes / group_bytes + 1;
  const size_t height = kChunkInputs / (kernels.stripe * args.inputs * (args.round ? 1 : sizeof(float))) + 1;
  const size_t down = ceil_div(stripes, height);
  parallel_for(ceil_div(groups, width) * down, [&](size_t chunk) {
    const size_t group = chunk / down * width, stripe = chunk % down * height;
    const size_t last_group = group + width < groups ? group + width : groups;
    const size_t last_stripe = stripe + height < stripes ? stripe + height : stripes;
    kernels.multiply(args, tiles, group, last_group, stripe, last_stripe);
  });
}

Floats floats(const ffi::AnyBuffer& buffer) {
  const void* data = buffer.element_count() == 0 ? nullptr : buffer.untyped_data();
  switch (buffer.element_type()) {
    case ffi::F16: return {data, FloatType::kF16};
    case ffi::BF16: return {data, FloatType::kBF16};
    default: return {data, FloatType::kF32};
  }
}

const float* optional(const ffi::Buffer<ffi::F32>& buffer) {
  return buffer.element_count() == 0 ? nullptr : buffer.typed_data();
}

// Empty buffers stand for what there is not. Shapes and types are checked where the call is made, in Python.
ffi::Error linear(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                  ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> gain, ffi::ResultBuffer<ffi::F32> y, float eps,
                  int32_t bits, bool round, int32_t gate) try {
  LinearArgs args{};
  args.x = x.typed_data();
  args.rows = x.dimensions()[0];
  args.inputs = x.dimensions()[1];
  args.gain = optional(gain);
  args.eps = eps;
  args.codes = codes.typed_data();
  args.scale = floats(scale);
  args.minimum = floats(minimum);
  args.panels = scale.dimensions()[0];
  args.scales = scale.dimensions()[1];
  args.bits = bits;
  args.round = round;
  args.bias = optional(bias);
  args.gate = static_cast<Gate>(gate);
  args.y = y->typed_data();
  args.outputs = y->dimensions()[1];

  const LinearKernels& kernels = jaxopt::kernels().linear;
  const Tiles tiles = make_tiles(args);
  prepare(kernels, args, tiles);
  multiply(kernels, args, tiles);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations of a linear layer");
}

}  // namespace
}  // namespace jaxopt

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxopt_linear, jaxopt::linear,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // x [rows, inputs]
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()    // codes
                                  .Arg<xla::ffi::AnyBuffer>()               // scale [panels, scales, 16]
                                  .Arg<xla::ffi::AnyBuffer>()               // minimum
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // bias [panels, 16]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // gain [inputs]
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()   // y [rows, outputs]
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("bits")
                                  .Attr<bool>("round")
                                  .Attr<int32_t>("gate"));
