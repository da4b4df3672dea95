// The XLA call `jaxopt_linear`: shares the work of one product among the threads.
#include "linear.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace jaxopt {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kRoundAlone = 1 << 14;     // activations that are not worth a second thread
constexpr size_t kMultiplyAlone = 1 << 16;  // multiplications likewise
constexpr size_t kChunkBytes = 1 << 15;     // weights that a thread takes at once, at least
constexpr size_t kStretchBytes = 1 << 18;   // and at most, for few rows: a longer stretch is read no faster
constexpr size_t kChunksOfThread = 8;       // of such stretches, for threads to end together
constexpr size_t kChunkInputs = 1 << 19;    // activations that its second-level cache has room for

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

Tiles make_tiles(const LinearArgs& args) {
  thread_local Scratch scratch;
  const size_t blocks = args.rows * args.blocks(), words = (2 + kDigitsOfFloat) * blocks;
  char* memory = scratch.reserve(words * sizeof(float) + args.rows * args.inputs * args.x_bytes);
  Tiles tiles;
  tiles.x = memory;  // first, for its rows to share few cache lines
  tiles.scale = reinterpret_cast<float*>(memory + args.rows * args.inputs * args.x_bytes);
  tiles.sum = tiles.scale + blocks;
  tiles.start = reinterpret_cast<int32_t*>(tiles.sum + blocks);
  return tiles;
}

Floats advanced(Floats floats, size_t count) {
  if (floats.data == nullptr) return floats;
  const size_t bytes = count * (floats.type == FloatType::kF32 ? sizeof(float) : sizeof(uint16_t));
  return {static_cast<const char*>(floats.data) + bytes, floats.type};
}

// Rows that share their weights: those of one expert, or all.
struct Part {
  LinearArgs args;
  Tiles tiles;
  size_t stripes_before = 0, chunks_before = 0;

  Part(const LinearArgs& all, const Tiles& all_tiles, size_t expert, size_t first, size_t rows)
      : args(all), tiles(all_tiles) {
    const size_t panels = expert * all.panels, block = first * all.blocks();
    args.rows = rows;
    args.x += first * all.inputs;
    args.y += first * all.outputs;
    args.codes += panels * kLanes * all.inputs * all.bits / 8;
    args.scale = advanced(all.scale, panels * all.scales * kLanes);
    args.minimum = advanced(all.minimum, panels * all.scales * kLanes);
    if (args.bias != nullptr) args.bias += panels * kLanes;
    tiles.x += first * all.inputs * all.x_bytes;
    tiles.scale += block;
    tiles.sum += block;
    tiles.start += block * kDigitsOfFloat;
  }
};

// The experts in use. `sizes` is empty where there is one weight for all rows.
std::vector<Part> parts_of(const LinearArgs& args, const Tiles& tiles, const int32_t* sizes, size_t experts) {
  if (experts == 0) return {Part(args, tiles, 0, 0, args.rows)};
  std::vector<Part> parts;
  size_t first = 0;
  for (size_t expert = 0; expert < experts; ++expert) {
    const size_t rows = std::min<size_t>(std::max(sizes[expert], 0), args.rows - first);
    if (rows > 0) parts.emplace_back(args, tiles, expert, first, rows);
    first += rows;
  }
  return parts;
}

// Calls `use(part, index in it)` for every index below `count`, of which `before` says how many lie before each part.
template <class Use>
void share(const std::vector<Part>& parts, size_t Part::*before, size_t count, bool alone, const Use& use) {
  const auto each = [&](size_t index) {
    const auto after = [before](size_t i, const Part& part) { return i < part.*before; };
    const Part& part = *(std::upper_bound(parts.begin(), parts.end(), index, after) - 1);
    use(part, index - part.*before);
  };
  if (!alone) return parallel_for(count, each);
  for (size_t index = 0; index < count; ++index) each(index);
}

void prepare(const LinearKernels& kernels, const LinearArgs& all, std::vector<Part>& parts) {
  size_t count = 0;
  for (Part& part : parts) {
    part.stripes_before = count;
    count += ceil_div(part.args.rows, all.stripe);
  }
  share(parts, &Part::stripes_before, count, all.rows * all.inputs <= kRoundAlone,
        [&](const Part& part, size_t stripe) { kernels.prepare(part.args, part.tiles, stripe); });
}

// Few rows wait for their weights, and each chunk begins with none of them on the way.
size_t chunk_bytes(const LinearArgs& args) {
  if (args.rows > args.stripe) return kChunkBytes;
  const size_t fair = args.panels * kLanes * args.inputs * args.bits / 8 / (kChunksOfThread * num_threads());
  return std::clamp(fair, kChunkBytes, kStretchBytes);
}

// Chunks are a few groups of outputs by many rows: their weights stay in cache while the rows pass.
void multiply(const LinearKernels& kernels, const LinearArgs& all, std::vector<Part>& parts) {
  const size_t groups = all.panels / all.panels_per_group();
  const size_t tile_bytes = kMostPanels * kLanes * all.inputs * all.bits / 8;
  const size_t width = (chunk_bytes(all) / tile_bytes + 1) * kMostPanels / all.panels_per_group();
  const size_t height = kChunkInputs / (all.stripe * all.inputs * all.x_bytes) + 1;
  const auto stripes = [&](const Part& part) { return ceil_div(part.args.rows, all.stripe); };
  const auto down = [&](const Part& part) { return ceil_div(stripes(part), height); };
  size_t count = 0;
  for (Part& part : parts) {
    part.chunks_before = count;
    count += ceil_div(groups, width) * down(part);
  }
  const bool alone = all.rows * all.panels * kLanes * all.inputs <= kMultiplyAlone;
  share(parts, &Part::chunks_before, count, alone, [&](const Part& part, size_t chunk) {
    const size_t group = chunk / down(part) * width, stripe = chunk % down(part) * height;
    thread_local Scratch scratch;
    char* unpacked = scratch.reserve(kMostPanels * kLanes * all.inputs);
    kernels.multiply(part.args, part.tiles, group, std::min(group + width, groups), stripe,
                     std::min(stripe + height, stripes(part)), reinterpret_cast<uint8_t*>(unpacked));
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

// Empty buffers stand for what there is not: without sizes there are no experts in any shape. Shapes and types are
// checked where the call is made, in Python.
ffi::Error linear(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                  ffi::Buffer<ffi::F32> bias, ffi::Buffer<ffi::F32> gain, ffi::Buffer<ffi::S32> sizes,
                  ffi::ResultBuffer<ffi::F32> y, float eps, int32_t bits, bool round, int32_t gate) try {
  const LinearKernels& kernels = jaxopt::kernels().linear;
  LinearArgs args{};
  args.x = x.typed_data();
  args.rows = x.dimensions()[0];
  args.inputs = x.dimensions()[1];
  args.gain = optional(gain);
  args.eps = eps;
  args.codes = codes.typed_data();
  args.scale = floats(scale);
  args.minimum = floats(minimum);
  const auto shape = scale.dimensions();
  args.panels = shape[shape.size() - 3];
  args.scales = shape[shape.size() - 2];
  args.block = args.inputs / args.scales % kRounded == 0 ? kRounded : kRounded / 2;
  args.bits = bits;
  args.round = round;
  args.x_bytes = round ? 1 : kernels.float_bytes;
  args.stripe = kernels.stripe(args);
  args.bias = optional(bias);
  args.gate = static_cast<Gate>(gate);
  args.y = y->typed_data();
  args.outputs = y->dimensions()[1];

  std::vector<Part> parts = parts_of(args, make_tiles(args), sizes.typed_data(), sizes.element_count());
  prepare(kernels, args, parts);
  multiply(kernels, args, parts);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the activations of a linear layer");
}

}  // namespace
}  // namespace jaxopt

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxopt_linear, jaxopt::linear,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // x [rows, inputs]
                                  .Arg<xla::ffi::Buffer<xla::ffi::U8>>()    // codes [experts, panels, ...]
                                  .Arg<xla::ffi::AnyBuffer>()               // scale [experts, panels, scales, 16]
                                  .Arg<xla::ffi::AnyBuffer>()               // minimum
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // bias [experts, panels, 16]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // gain [inputs]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // sizes [experts]
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()   // y [rows, outputs]
                                  .Attr<float>("eps")
                                  .Attr<int32_t>("bits")
                                  .Attr<bool>("round")
                                  .Attr<int32_t>("gate"));
