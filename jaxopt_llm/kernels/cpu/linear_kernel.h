// The product itself, over any simd_*.h. See linear.h for the layouts.
#pragma once

#include "linear.h"

namespace {

using jaxopt::Floats;
using jaxopt::FloatType;
using jaxopt::Gate;
using jaxopt::kBlock;
using jaxopt::kLanes;
using jaxopt::LinearArgs;
using jaxopt::Tiles;

constexpr size_t kStripe = simd::kTileRows[0];
constexpr size_t kVectors = kBlock / 4;  // of four inputs in a block
constexpr size_t kAhead = 8192;          // bytes of weights that are fetched before they are read
constexpr float kSmallest = 1.17549435e-38f;

JAXOPT_INLINE F32 load_floats(Floats from, size_t vector) {
  const size_t at = vector * kLanes;
  switch (from.type) {
    case FloatType::kF16: return simd::load_f16(static_cast<const uint16_t*>(from.data) + at);
    case FloatType::kBF16: return simd::load_bf16(static_cast<const uint16_t*>(from.data) + at);
    default: return simd::load(static_cast<const float*>(from.data) + at);
  }
}

// ---- tiles of rows --------------------------------------------------------------------------------------------------

inline size_t tile_height(size_t rows) {
  for (size_t height : simd::kTileRows) {
    if (height <= rows) return height;
  }
  return 1;
}

// Calls `use(first row, height)` for each tile of a stripe.
template <class Use>
inline void for_each_tile(const LinearArgs& args, size_t stripe, Use use) {
  const size_t stop = (stripe + 1) * kStripe, end = stop < args.rows ? stop : args.rows;
  for (size_t row = stripe * kStripe; row < end;) {
    const size_t height = tile_height(end - row);
    use(row, height);
    row += height;
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

// Where a row goes in its tile: a block of it follows the same block of the row before.
struct TileRow {
  int8_t* codes;
  float* values;
  float* scale;
  float* sum;
  int32_t* start;
  size_t height;
  int32_t zero;  // what the product sees in place of the code 0

  TileRow(const LinearArgs& args, const Tiles& tiles, size_t base, size_t row, size_t height) : height(height) {
    const size_t first = base * args.inputs + row * kBlock, first_block = base * args.blocks() + row;
    codes = tiles.codes + first;
    values = tiles.values + first;
    scale = tiles.scale + first_block;
    sum = tiles.sum + first_block;
    start = tiles.start + first_block;
    zero = args.bits == 8 ? simd::kByteZero : args.nibble_zero();
  }
};

// A row of activations, through the norm if there is one.
template <bool kNorm>
struct InputRow {
  const float* x;
  const float* gain;
  F32 factor;

  InputRow(const LinearArgs& args, size_t row) : x(args.x + row * args.inputs), gain(args.gain), factor(simd::zero()) {
    if (!kNorm) return;
    F32 squares = simd::zero();
    for (size_t i = 0; i < args.inputs; i += kLanes) {
      const F32 value = simd::load(x + i);
      squares = simd::fma(value, value, squares);
    }
    factor = simd::broadcast(1.0f / sqrtf(simd::reduce_add(squares) / static_cast<float>(args.inputs) + args.eps));
  }

  JAXOPT_INLINE F32 at(size_t i) const {
    const F32 value = simd::load(x + i);
    return kNorm ? simd::mul(simd::mul(value, factor), simd::load(gain + i)) : value;
  }
};

// Rounds up to 16 blocks to nearest, so that max|x| becomes 127: their divisions are done at once.
template <bool kNorm>
JAXOPT_INLINE void round_blocks(const InputRow<kNorm>& from, const TileRow& to, size_t first, size_t count) {
  float scale[kLanes] = {}, step[kLanes], inverse[kLanes];
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (first + i) * kBlock;
    scale[i] = simd::max_magnitude(from.at(at), from.at(at + kLanes));
  }
  const F32 scales = simd::div(simd::load(scale), simd::broadcast(127.0f));
  const F32 steps = simd::max(scales, simd::broadcast(kSmallest));  // a block of zeros has zeros for codes
  simd::store(scale, scales);
  simd::store(step, steps);
  simd::store(inverse, simd::div(simd::broadcast(1.0f), steps));
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (first + i) * kBlock, block = (first + i) * to.height;
    const F32 divisor = simd::broadcast(step[i]), factor = simd::broadcast(inverse[i]);
    const I32 a = simd::clip(simd::round(simd::divide(from.at(at), divisor, factor)), 127);
    const I32 b = simd::clip(simd::round(simd::divide(from.at(at + kLanes), divisor, factor)), 127);
    simd::store_bytes(to.codes + block * kBlock, a);
    simd::store_bytes(to.codes + block * kBlock + kLanes, b);
    const int32_t sum = simd::reduce_add(simd::add(a, b));
    to.scale[block] = scale[i];
    to.sum[block] = scale[i] * static_cast<float>(sum);
    to.start[block] = -sum * to.zero;
  }
}

template <bool kNorm>
void prepare_rounded(const LinearArgs& args, size_t row, TileRow to) {
  const InputRow<kNorm> from(args, row);
  const size_t blocks = args.blocks();
  size_t block = 0;
  for (; block + kLanes <= blocks; block += kLanes) round_blocks(from, to, block, kLanes);
  round_blocks(from, to, block, blocks - block);
}

template <bool kNorm>
void prepare_plain(const LinearArgs& args, size_t row, TileRow to) {
  const InputRow<kNorm> from(args, row);
  const size_t blocks = args.blocks();
  for (size_t i = 0; i < blocks; ++i) {
    const F32 a = from.at(i * kBlock), b = from.at(i * kBlock + kLanes);
    simd::store(to.values + i * to.height * kBlock, a);
    simd::store(to.values + i * to.height * kBlock + kLanes, b);
    to.sum[i * to.height] = simd::reduce_add(simd::add(a, b));
  }
}

void prepare(const LinearArgs& args, const Tiles& tiles, size_t stripe) {
  const auto with_norm = args.round ? prepare_rounded<true> : prepare_plain<true>;
  const auto without = args.round ? prepare_rounded<false> : prepare_plain<false>;
  const auto prepare_row = args.gain != nullptr ? with_norm : without;
  for_each_tile(args, stripe, [&](size_t base, size_t height) {
    for (size_t row = 0; row < height; ++row) prepare_row(args, base + row, TileRow(args, tiles, base, row, height));
  });
}

// ---- weights --------------------------------------------------------------------------------------------------------

// `vector(codes, k)` is the k-th vector of the block that starts there.
struct ByteForm {
  static constexpr size_t kBlockBytes = 64 * kVectors;

  static JAXOPT_INLINE simd::Bytes vector(const uint8_t* codes, size_t k) {
    return simd::bytes(simd::load_codes(codes + 64 * k));
  }
  static JAXOPT_INLINE F32 value(simd::Bytes w, int j, int32_t) { return simd::code(w, j); }
};

struct NibbleForm {
  static constexpr size_t kBlockBytes = 32 * kVectors;

  static JAXOPT_INLINE simd::Nibbles vector(const uint8_t* codes, size_t k) {
    const simd::Codes pair = simd::load_codes(codes + 64 * (k / 2));
    return k % 2 == 0 ? simd::low_nibbles(pair) : simd::high_nibbles(pair);
  }
  static JAXOPT_INLINE F32 value(simd::Nibbles w, int j, int32_t zero) { return simd::code(w, j, zero); }
};

// ---- one panel with one tile of rows --------------------------------------------------------------------------------

// A tile's rounded rows, block after block.
template <class Form, size_t kRows>
struct RoundedRows {
  const int8_t* x;
  const float* scale;
  const int32_t* start;

  RoundedRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(tiles.codes + base * args.inputs),
        scale(tiles.scale + base * args.blocks()),
        start(tiles.start + base * args.blocks()) {}

  // Adds a block's products.
  JAXOPT_INLINE void next(const uint8_t* codes, F32 weight_scale, F32 (&total)[kRows]) {
    I32 sum[kRows];
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) sum[r] = simd::broadcast(start[r]);
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors; ++k) {
      const auto weights = Form::vector(codes, k);
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) sum[r] = simd::dot(sum[r], weights, simd::four_inputs(x + r * kBlock + 4 * k));
    }
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) {
      const F32 factor = simd::mul(weight_scale, simd::broadcast(scale[r]));
      total[r] = simd::fma(simd::to_float(sum[r]), factor, total[r]);
    }
    x += kBlock * kRows;
    scale += kRows;
    start += kRows;
  }
};

// The same for rows that are not rounded.
template <class Form, size_t kRows>
struct PlainRows {
  const float* x;
  int32_t zero;

  PlainRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(tiles.values + base * args.inputs), zero(args.nibble_zero()) {}

  JAXOPT_INLINE void next(const uint8_t* codes, F32 weight_scale, F32 (&total)[kRows]) {
    F32 sum[kRows];
    JAXOPT_UNROLL
    for (F32& s : sum) s = simd::zero();
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors; ++k) {
      const auto weights = Form::vector(codes, k);
      JAXOPT_UNROLL
      for (int j = 0; j < 4; ++j) {
        const F32 value = Form::value(weights, j, zero);
        JAXOPT_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
          sum[r] = simd::fma(value, simd::broadcast(x[r * kBlock + 4 * k + j]), sum[r]);
        }
      }
    }
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) total[r] = simd::fma(sum[r], weight_scale, total[r]);
    x += kBlock * kRows;
  }
};

template <template <class, size_t> class Rows, class Form, bool kMinimum, size_t kRows>
void multiply_tile(const LinearArgs& args, const Tiles& tiles, size_t panel, size_t base, float* out) {
  const size_t blocks = args.blocks(), scales = args.scales, blocks_per_scale = blocks / scales;
  const uint8_t* codes = args.codes + panel * blocks * Form::kBlockBytes;
  const float* x_sum = tiles.sum + base * blocks;
  Rows<Form, kRows> rows(args, tiles, base);
  const bool from_memory = base == 0;  // later tiles find the panel in cache

  F32 total[kRows];
  JAXOPT_UNROLL
  for (F32& t : total) t = simd::zero();
  for (size_t s = 0; s < scales; ++s) {
    const F32 scale = load_floats(args.scale, panel * scales + s);
    F32 minimum = simd::zero();
    if (kMinimum) minimum = load_floats(args.minimum, panel * scales + s);
    for (size_t b = 0; b < blocks_per_scale; ++b) {
      if (from_memory) {  // hardware stops fetching ahead at the end of each page
        JAXOPT_UNROLL
        for (size_t line = 0; line < Form::kBlockBytes; line += 64) simd::prefetch(codes + kAhead + line);
      }
      rows.next(codes, scale, total);
      codes += Form::kBlockBytes;
      if (kMinimum) {
        JAXOPT_UNROLL
        for (size_t r = 0; r < kRows; ++r) total[r] = simd::fma(minimum, simd::broadcast(x_sum[r]), total[r]);
        x_sum += kRows;
      }
    }
  }
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) simd::store(out + r * kLanes, total[r]);
}

// The instance of `multiply_tile` for a product, found once for each tile.
using TileFunction = void (*)(const LinearArgs&, const Tiles&, size_t panel, size_t base, float* out);

template <class Form, bool kMinimum, size_t kRows>
TileFunction tile_function(const LinearArgs& args) {
  return args.round ? multiply_tile<RoundedRows, Form, kMinimum, kRows> : multiply_tile<PlainRows, Form, kMinimum, kRows>;
}

template <class Form, size_t kRows>
TileFunction tile_function(const LinearArgs& args) {
  return args.minimum.data != nullptr ? tile_function<Form, true, kRows>(args) : tile_function<Form, false, kRows>(args);
}

template <size_t kIndex = 0>
TileFunction tile_function(const LinearArgs& args, size_t height) {
  constexpr size_t kRows = simd::kTileRows[kIndex];
  if constexpr (kRows > 1) {
    if (height != kRows) return tile_function<kIndex + 1>(args, height);
  }
  return args.bits == 8 ? tile_function<ByteForm, kRows>(args) : tile_function<NibbleForm, kRows>(args);
}

// ---- results --------------------------------------------------------------------------------------------------------

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

void multiply(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group, size_t first_stripe,
              size_t last_stripe) {
  const size_t panels = args.panels_per_group();
  float sums[2][kStripe * kLanes];
  for (size_t group = first_group; group < last_group; ++group) {
    for (size_t stripe = first_stripe; stripe < last_stripe; ++stripe) {
      for_each_tile(args, stripe, [&](size_t base, size_t height) {
        const TileFunction tile = tile_function(args, height);
        for (size_t p = 0; p < panels; ++p) tile(args, tiles, group * panels + p, base, sums[p]);
        for (size_t r = 0; r < height; ++r) finish(args, group, base + r, sums[0] + r * kLanes, sums[1] + r * kLanes);
      });
    }
  }
}

inline jaxopt::LinearKernels linear_kernels() { return {kStripe, prepare, multiply}; }

}  // namespace
