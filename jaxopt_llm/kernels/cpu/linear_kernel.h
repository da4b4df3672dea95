// The product itself, over any simd_*.h. See linear.h for the layouts.
#pragma once

#include "linear.h"

namespace {

using jaxopt::Floats;
using jaxopt::FloatType;
using jaxopt::Gate;
using jaxopt::kBlock;
using jaxopt::kLanes;
using jaxopt::kMostPanels;
using jaxopt::LinearArgs;
using jaxopt::Tiles;

constexpr size_t kStripe = simd::kTileRows[0];
constexpr size_t kVectors = kBlock / 4;  // of four inputs in a block
constexpr size_t kAhead = 8192;          // bytes of weights that are fetched before they are read
constexpr size_t kTall = 4;              // stripes that take longer than reading their weights from memory
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

inline bool is_tall(size_t first_stripe, size_t last_stripe) { return last_stripe - first_stripe >= kTall; }

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
  using Vector = simd::Bytes;
  static constexpr size_t kBlockBytes = 64 * kVectors;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    return simd::bytes(simd::load_codes(codes + 64 * k));
  }
  static JAXOPT_INLINE F32 value(Vector w, int j, int32_t) { return simd::code(w, j); }
};

struct NibbleForm {
  using Vector = simd::Nibbles;
  static constexpr size_t kBlockBytes = 32 * kVectors;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    const simd::Codes pair = simd::load_codes(codes + 64 * (k / 2));
    return k % 2 == 0 ? simd::low_nibbles(pair) : simd::high_nibbles(pair);
  }
  static JAXOPT_INLINE F32 value(Vector w, int j, int32_t zero) { return simd::code(w, j, zero); }
};

// Nibbles that `unpack` has made bytes of.
struct UnpackedForm {
  using Vector = simd::Nibbles;
  static constexpr size_t kBlockBytes = 64 * kVectors;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    return simd::nibbles(simd::load_codes(codes + 64 * k));
  }
  static JAXOPT_INLINE F32 value(Vector w, int j, int32_t zero) { return NibbleForm::value(w, j, zero); }
};

inline void unpack(const uint8_t* nibbles, size_t blocks, uint8_t* bytes) {
  for (size_t i = 0; i < blocks; ++i) {
    for (size_t k = 0; k < kVectors; ++k) simd::store_codes(bytes + 64 * k, NibbleForm::vector(nibbles, k));
    nibbles += NibbleForm::kBlockBytes;
    bytes += UnpackedForm::kBlockBytes;
  }
}

// ---- a tile: some panels with some rows -----------------------------------------------------------------------------

// A block of inputs of some panels.
template <class Form, size_t kPanels>
struct WeightBlock {
  const uint8_t* codes[kPanels];
  F32 scale[kPanels];
};

// What a tile gives for a panel: 16 outputs of each row.
using Sums = float[kStripe][kLanes];

template <size_t kPanels, size_t kRows>
JAXOPT_INLINE void add_minimum(const F32 (&minimum)[kPanels], const float* x_sum, F32 (&total)[kPanels][kRows]) {
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) {
    const F32 sum = simd::broadcast(x_sum[r]);
    JAXOPT_UNROLL
    for (size_t p = 0; p < kPanels; ++p) total[p][r] = simd::fma(minimum[p], sum, total[p][r]);
  }
}

template <size_t kPanels, size_t kRows>
JAXOPT_INLINE void clear(F32 (&sums)[kPanels][kRows]) {
  JAXOPT_UNROLL
  for (auto& panel : sums) {
    JAXOPT_UNROLL
    for (F32& sum : panel) sum = simd::zero();
  }
}

// A tile's rounded rows, block after block.
template <class Form, size_t kPanels, size_t kRows>
struct RoundedRows {
  const int8_t* x;
  const float* scale;
  const int32_t* start;

  RoundedRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(tiles.codes + base * args.inputs),
        scale(tiles.scale + base * args.blocks()),
        start(tiles.start + base * args.blocks()) {}

  // Adds a block's products.
  JAXOPT_INLINE void next(const WeightBlock<Form, kPanels>& weights, F32 (&total)[kPanels][kRows]) {
    I32 sum[kPanels][kRows];
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) {
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) sum[p][r] = simd::broadcast(start[r]);
    }
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors; ++k) {
      typename Form::Vector vector[kPanels];
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) vector[p] = Form::vector(weights.codes[p], k);
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) {
        const simd::Four four = simd::four_inputs(x + r * kBlock + 4 * k);
        JAXOPT_UNROLL
        for (size_t p = 0; p < kPanels; ++p) sum[p][r] = simd::dot(sum[p][r], vector[p], four);
      }
    }
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) {
      const F32 row_scale = simd::broadcast(scale[r]);
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) {
        total[p][r] = simd::fma(simd::to_float(sum[p][r]), simd::mul(weights.scale[p], row_scale), total[p][r]);
      }
    }
    x += kBlock * kRows;
    scale += kRows;
    start += kRows;
  }
};

// The same for rows that are not rounded.
template <class Form, size_t kPanels, size_t kRows>
struct PlainRows {
  const float* x;
  int32_t zero;

  PlainRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(tiles.values + base * args.inputs), zero(args.nibble_zero()) {}

  JAXOPT_INLINE void next(const WeightBlock<Form, kPanels>& weights, F32 (&total)[kPanels][kRows]) {
    F32 sum[kPanels][kRows];
    clear(sum);
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors; ++k) {
      typename Form::Vector vector[kPanels];
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) vector[p] = Form::vector(weights.codes[p], k);
      JAXOPT_UNROLL
      for (int j = 0; j < 4; ++j) {
        F32 value[kPanels];
        JAXOPT_UNROLL
        for (size_t p = 0; p < kPanels; ++p) value[p] = Form::value(vector[p], j, zero);
        JAXOPT_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
          const F32 input = simd::broadcast(x[r * kBlock + 4 * k + j]);
          JAXOPT_UNROLL
          for (size_t p = 0; p < kPanels; ++p) sum[p][r] = simd::fma(value[p], input, sum[p][r]);
        }
      }
    }
    JAXOPT_UNROLL
    for (size_t p = 0; p < kPanels; ++p) {
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) total[p][r] = simd::fma(sum[p][r], weights.scale[p], total[p][r]);
    }
    x += kBlock * kRows;
  }
};

// Sums of panels from `panel` on, whose codes begin at `codes`: of each, 16 outputs a row.
template <template <class, size_t, size_t> class Rows, class Form, bool kMinimum, size_t kPanels, size_t kRows>
void multiply_tile(const LinearArgs& args, const Tiles& tiles, const uint8_t* codes, size_t panel, size_t base,
                   Sums* out) {
  const size_t blocks = args.blocks(), scales = args.scales, blocks_per_scale = blocks / scales;
  const float* x_sum = tiles.sum + base * blocks;
  Rows<Form, kPanels, kRows> rows(args, tiles, base);
  const bool from_memory = base == 0 && kPanels == 1;  // later tiles find the panel in cache

  WeightBlock<Form, kPanels> weights;
  for (size_t p = 0; p < kPanels; ++p) weights.codes[p] = codes + p * blocks * Form::kBlockBytes;
  F32 minimum[kPanels], total[kPanels][kRows];
  clear(total);
  for (size_t s = 0; s < scales; ++s) {
    JAXOPT_UNROLL
    for (size_t p = 0; p < kPanels; ++p) {
      const size_t at = (panel + p) * scales + s;
      weights.scale[p] = load_floats(args.scale, at);
      if (kMinimum) minimum[p] = load_floats(args.minimum, at);
    }
    for (size_t b = 0; b < blocks_per_scale; ++b) {
      if (from_memory) {  // hardware stops fetching ahead at the end of each page
        JAXOPT_UNROLL
        for (size_t line = 0; line < Form::kBlockBytes; line += 64) simd::prefetch(weights.codes[0] + kAhead + line);
      }
      rows.next(weights, total);
      JAXOPT_UNROLL
      for (const uint8_t*& block : weights.codes) block += Form::kBlockBytes;
      if (kMinimum) {
        add_minimum(minimum, x_sum, total);
        x_sum += kRows;
      }
    }
  }
  JAXOPT_UNROLL
  for (size_t p = 0; p < kPanels; ++p) {
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) simd::store(out[p][r], total[p][r]);
  }
}

// The instance of `multiply_tile` for a product, found once for each tile.
using TileFunction = void (*)(const LinearArgs&, const Tiles&, const uint8_t* codes, size_t panel, size_t base,
                              Sums* out);

template <class Form, bool kMinimum, size_t kPanels, size_t kRows>
TileFunction tile_function(const LinearArgs& args) {
  return args.round ? multiply_tile<RoundedRows, Form, kMinimum, kPanels, kRows>
                    : multiply_tile<PlainRows, Form, kMinimum, kPanels, kRows>;
}

template <class Form, size_t kPanels, size_t kIndex = 0>
TileFunction tile_function(const LinearArgs& args, size_t height) {
  constexpr size_t kRows = simd::kTileRows[kIndex];
  if constexpr (kRows > 1) {
    if (height != kRows) return tile_function<Form, kPanels, kIndex + 1>(args, height);
  }
  return args.minimum.data != nullptr ? tile_function<Form, true, kPanels, kRows>(args)
                                      : tile_function<Form, false, kPanels, kRows>(args);
}

template <class Form>
TileFunction tile_function(const LinearArgs& args, size_t panels, size_t height) {
  return panels == 1 ? tile_function<Form, 1>(args, height) : tile_function<Form, simd::kTilePanels>(args, height);
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

// A few groups with a chunk's rows. Few rows wait for memory, and read it as it lies, a panel after another.
template <class Form>
void multiply_groups(const LinearArgs& args, const Tiles& tiles, const uint8_t* codes, size_t first_group,
                     size_t groups, size_t first_stripe, size_t last_stripe) {
  const size_t per_group = args.panels_per_group(), panels = groups * per_group, first = first_group * per_group;
  const size_t wide = is_tall(first_stripe, last_stripe) && panels >= simd::kTilePanels ? simd::kTilePanels : 1;
  Sums sums[kMostPanels];
  for (size_t stripe = first_stripe; stripe < last_stripe; ++stripe) {
    for_each_tile(args, stripe, [&](size_t base, size_t height) {
      const TileFunction tile = tile_function<Form>(args, wide, height);
      for (size_t p = 0; p < panels; p += wide) {
        tile(args, tiles, codes + p * args.blocks() * Form::kBlockBytes, first + p, base, sums + p);
      }
      for (size_t g = 0; g < groups; ++g) {
        const Sums* own = sums + g * per_group;
        for (size_t r = 0; r < height; ++r) finish(args, first_group + g, base + r, own[0][r], own[per_group - 1][r]);
      }
    });
  }
}

void multiply(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group, size_t first_stripe,
              size_t last_stripe, uint8_t* unpacked) {
  const size_t per_group = args.panels_per_group(), most = kMostPanels / per_group;
  for (size_t group = first_group; group < last_group; group += most) {
    const size_t left = last_group - group, groups = left < most ? left : most;
    const size_t first_block = group * per_group * args.blocks();
    if (args.bits == 8) {
      const uint8_t* codes = args.codes + first_block * ByteForm::kBlockBytes;
      multiply_groups<ByteForm>(args, tiles, codes, group, groups, first_stripe, last_stripe);
      continue;
    }
    const uint8_t* codes = args.codes + first_block * NibbleForm::kBlockBytes;
    if (is_tall(first_stripe, last_stripe)) {
      unpack(codes, groups * per_group * args.blocks(), unpacked);
      multiply_groups<UnpackedForm>(args, tiles, unpacked, group, groups, first_stripe, last_stripe);
    } else {
      multiply_groups<NibbleForm>(args, tiles, codes, group, groups, first_stripe, last_stripe);
    }
  }
}

inline jaxopt::LinearKernels linear_kernels() { return {kStripe, prepare, multiply}; }

}  // namespace
