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

// The tallest tile for so many rows.
inline size_t tile_height(size_t rows) {
  for (size_t height : simd::kTileRows) {
    if (height <= rows) return height;
  }
  return 1;
}

inline F32 load_floats(Floats from, size_t vector) {
  const size_t at = vector * kLanes;
  switch (from.type) {
    case FloatType::kF16: return simd::load_f16(static_cast<const uint16_t*>(from.data) + at);
    case FloatType::kBF16: return simd::load_bf16(static_cast<const uint16_t*>(from.data) + at);
    default: return simd::load(static_cast<const float*>(from.data) + at);
  }
}

// ---- activations --------------------------------------------------------------------------------------------------

// One row's place in its tile.
struct Place {
  size_t base;  // of the tile, in rows
  size_t row, height;
};

// What the norm multiplies the row with, apart from the gain.
inline float inverse_rms(const float* x, const LinearArgs& args) {
  F32 squares = simd::zero();
  for (size_t i = 0; i < args.inputs; i += kLanes) {
    const F32 value = simd::load(x + i);
    squares = simd::fma(value, value, squares);
  }
  return 1.0f / sqrtf(simd::reduce_add(squares) / static_cast<float>(args.inputs) + args.eps);
}

inline F32 normal(const float* x, const LinearArgs& args, size_t i, F32 inverse) {
  const F32 value = simd::load(x + i);
  return args.gain == nullptr ? value : simd::mul(simd::mul(value, inverse), simd::load(args.gain + i));
}

// The block of a row, rounded to nearest: max|x| becomes 127.
inline void round_block(F32 a, F32 b, const LinearArgs& args, const Tiles& tiles, Place place, size_t block) {
  const float scale = simd::max_magnitude(a, b) / 127.0f;
  const F32 divisor = simd::broadcast(scale == 0.0f ? 1.0f : scale);
  const I32 first = simd::clip(simd::round(simd::div(a, divisor)), 127);
  const I32 second = simd::clip(simd::round(simd::div(b, divisor)), 127);
  int8_t codes[kBlock];
  simd::store_bytes(codes, first);
  simd::store_bytes(codes + kLanes, second);
  int8_t* to = tiles.codes + place.base * args.inputs + (block * kVectors * place.height + place.row) * 4;
  for (size_t k = 0; k < kVectors; ++k) std::memcpy(to + k * place.height * 4, codes + 4 * k, 4);

  const int32_t sum = simd::reduce_add(simd::add(first, second));
  const size_t at = place.base * args.blocks() + block * place.height + place.row;
  tiles.scale[at] = scale;
  tiles.sum[at] = scale * static_cast<float>(sum);
  tiles.start[at] = -sum * (args.bits == 8 ? simd::kByteZero : args.nibble_zero());
}

inline void copy_block(F32 a, F32 b, const LinearArgs& args, const Tiles& tiles, Place place, size_t block) {
  float values[kBlock];
  simd::store(values, a);
  simd::store(values + kLanes, b);
  float* to = tiles.values + place.base * args.inputs + block * kBlock * place.height + place.row;
  for (size_t i = 0; i < kBlock; ++i) to[i * place.height] = values[i];
  tiles.sum[place.base * args.blocks() + block * place.height + place.row] = simd::reduce_add(simd::add(a, b));
}

inline void prepare_row(const LinearArgs& args, const Tiles& tiles, Place place) {
  const float* x = args.x + (place.base + place.row) * args.inputs;
  const F32 inverse = simd::broadcast(args.gain == nullptr ? 1.0f : inverse_rms(x, args));
  for (size_t block = 0; block < args.blocks(); ++block) {
    const F32 a = normal(x, args, block * kBlock, inverse);
    const F32 b = normal(x, args, block * kBlock + kLanes, inverse);
    if (args.round) {
      round_block(a, b, args, tiles, place, block);
    } else {
      copy_block(a, b, args, tiles, place, block);
    }
  }
}

// Calls `use(first row, height)` for each tile of a stripe.
template <class Use>
inline void for_each_tile(const LinearArgs& args, size_t stripe, Use use) {
  const size_t end = (stripe + 1) * kStripe < args.rows ? (stripe + 1) * kStripe : args.rows;
  for (size_t row = stripe * kStripe; row < end;) {
    const size_t height = tile_height(end - row);
    use(row, height);
    row += height;
  }
}

void prepare(const LinearArgs& args, const Tiles& tiles, size_t stripe) {
  for_each_tile(args, stripe, [&](size_t base, size_t height) {
    for (size_t row = 0; row < height; ++row) prepare_row(args, tiles, {base, row, height});
  });
}

// ---- weights ------------------------------------------------------------------------------------------------------

// `each(codes, zero, use)` calls `use(k, weights)` for the vectors of a block.
struct ByteForm {
  static constexpr size_t kBlockBytes = 64 * kVectors;

  template <class Use>
  static inline void each(const uint8_t* codes, Use use) {
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors; ++k) use(k, simd::bytes(simd::load_codes(codes + 64 * k)));
  }
  static inline F32 value(simd::Bytes w, int j, int32_t) { return simd::code(w, j); }
};

struct NibbleForm {
  static constexpr size_t kBlockBytes = 32 * kVectors;

  template <class Use>
  static inline void each(const uint8_t* codes, Use use) {
    JAXOPT_UNROLL
    for (size_t k = 0; k < kVectors / 2; ++k) {
      const simd::Codes pair = simd::load_codes(codes + 64 * k);
      use(2 * k, simd::low_nibbles(pair));
      use(2 * k + 1, simd::high_nibbles(pair));
    }
  }
  static inline F32 value(simd::Nibbles w, int j, int32_t zero) { return simd::code(w, j, zero); }
};

// ---- one panel with one tile of rows ------------------------------------------------------------------------------

template <class Form, bool kMinimum, size_t kRows>
void rounded_tile(const LinearArgs& args, const Tiles& tiles, size_t panel, size_t base, float* out) {
  const size_t blocks = args.blocks(), blocks_per_scale = blocks / args.scales;
  const uint8_t* codes = args.codes + panel * blocks * Form::kBlockBytes;
  const int8_t* x = tiles.codes + base * args.inputs;
  const float* x_scale = tiles.scale + base * blocks;
  const float* x_sum = tiles.sum + base * blocks;
  const int32_t* start = tiles.start + base * blocks;

  F32 total[kRows];
  JAXOPT_UNROLL
  for (F32& t : total) t = simd::zero();
  for (size_t s = 0; s < args.scales; ++s) {
    const F32 scale = load_floats(args.scale, panel * args.scales + s);
    F32 minimum = simd::zero();
    if (kMinimum) minimum = load_floats(args.minimum, panel * args.scales + s);
    for (size_t b = 0; b < blocks_per_scale; ++b) {
      I32 sum[kRows];
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) sum[r] = simd::broadcast(start[r]);
      Form::each(codes, [&](size_t k, auto weights) {
        JAXOPT_UNROLL
        for (size_t r = 0; r < kRows; ++r) sum[r] = simd::dot(sum[r], weights, x + (k * kRows + r) * 4);
      });
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) {
        const F32 factor = simd::mul(scale, simd::broadcast(x_scale[r]));
        total[r] = simd::fma(simd::to_float(sum[r]), factor, total[r]);
        if (kMinimum) total[r] = simd::fma(minimum, simd::broadcast(x_sum[r]), total[r]);
      }
      codes += Form::kBlockBytes;
      x += kBlock * kRows;
      x_scale += kRows;
      x_sum += kRows;
      start += kRows;
    }
  }
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) simd::store(out + r * kLanes, total[r]);
}

template <class Form, bool kMinimum, size_t kRows>
void float_tile(const LinearArgs& args, const Tiles& tiles, size_t panel, size_t base, float* out) {
  const size_t blocks = args.blocks(), blocks_per_scale = blocks / args.scales;
  const uint8_t* codes = args.codes + panel * blocks * Form::kBlockBytes;
  const float* x = tiles.values + base * args.inputs;
  const float* x_sum = tiles.sum + base * blocks;
  const int32_t zero = args.nibble_zero();

  F32 total[kRows];
  JAXOPT_UNROLL
  for (F32& t : total) t = simd::zero();
  for (size_t s = 0; s < args.scales; ++s) {
    const F32 scale = load_floats(args.scale, panel * args.scales + s);
    F32 minimum = simd::zero();
    if (kMinimum) minimum = load_floats(args.minimum, panel * args.scales + s);
    for (size_t b = 0; b < blocks_per_scale; ++b) {
      F32 sum[kRows];
      JAXOPT_UNROLL
      for (F32& t : sum) t = simd::zero();
      Form::each(codes, [&](size_t k, auto weights) {
        JAXOPT_UNROLL
        for (int j = 0; j < 4; ++j) {
          const F32 value = Form::value(weights, j, zero);
          JAXOPT_UNROLL
          for (size_t r = 0; r < kRows; ++r) {
            sum[r] = simd::fma(value, simd::broadcast(x[(4 * k + j) * kRows + r]), sum[r]);
          }
        }
      });
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) {
        total[r] = simd::fma(sum[r], scale, total[r]);
        if (kMinimum) total[r] = simd::fma(minimum, simd::broadcast(x_sum[r]), total[r]);
      }
      codes += Form::kBlockBytes;
      x += kBlock * kRows;
      x_sum += kRows;
    }
  }
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) simd::store(out + r * kLanes, total[r]);
}

using TileFunction = void (*)(const LinearArgs&, const Tiles&, size_t panel, size_t base, float* out);

template <class Form, bool kMinimum, size_t kRows>
TileFunction tile_function(bool round) {
  return round ? rounded_tile<Form, kMinimum, kRows> : float_tile<Form, kMinimum, kRows>;
}

template <size_t kRows>
TileFunction tile_function(const LinearArgs& args) {
  const bool minimum = args.minimum.data != nullptr;
  if (args.bits == 8) {
    return minimum ? tile_function<ByteForm, true, kRows>(args.round)
                   : tile_function<ByteForm, false, kRows>(args.round);
  }
  return minimum ? tile_function<NibbleForm, true, kRows>(args.round)
                 : tile_function<NibbleForm, false, kRows>(args.round);
}

template <size_t kIndex = 0>
TileFunction tile_function(const LinearArgs& args, size_t height) {
  constexpr size_t kRows = simd::kTileRows[kIndex];
  if constexpr (kRows == 1) {
    return tile_function<1>(args);
  } else {
    return height == kRows ? tile_function<kRows>(args) : tile_function<kIndex + 1>(args, height);
  }
}

// ---- results ------------------------------------------------------------------------------------------------------

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
  F32 result = with_bias(args, group * args.panels_per_output(), first);
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
  const size_t panels = args.panels_per_output();
  float sums[2][kStripe * kLanes];
  for (size_t group = first_group; group < last_group; ++group) {
    for (size_t stripe = first_stripe; stripe < last_stripe; ++stripe) {
      for_each_tile(args, stripe, [&](size_t base, size_t height) {
        const TileFunction tile = tile_function(args, height);
        for (size_t p = 0; p < panels; ++p) tile(args, tiles, group * panels + p, base, sums[p]);
        for (size_t r = 0; r < height; ++r) {
          finish(args, group, base + r, sums[0] + r * kLanes, sums[1] + r * kLanes);
        }
      });
    }
  }
}

inline jaxopt::LinearKernels linear_kernels() { return {kStripe, prepare, multiply}; }

}  // namespace
