// The product itself, over any simd_*.h. See linear.h for the layouts.
#pragma once

#include "floats.h"
#include "linear_results.h"

namespace {

using jaxopt::kBase;
using jaxopt::kDigitsOfFloat;
using jaxopt::kMostPanels;
using jaxopt::kRounded;
using jaxopt::Tiles;

constexpr size_t kAhead = 8192;  // bytes of weights that are fetched before they are read
constexpr size_t kTall = 4;      // stripes that take longer than reading their weights from memory
constexpr float kSmallest = 1.17549435e-38f;

// ---- tiles of rows --------------------------------------------------------------------------------------------------

// A tile as high as a stripe may be one for `linear_matrices.h`.
inline size_t tile_height(const LinearArgs& args, size_t rows) {
  if (rows >= args.stripe) return args.stripe;
  for (size_t height : simd::kTileRows) {
    if (height <= rows) return height;
  }
  return 1;
}

inline bool is_tall(size_t first_stripe, size_t last_stripe) { return last_stripe - first_stripe >= kTall; }

// Calls `use(first row, height)` for each tile of a stripe.
template <class Use>
inline void for_each_tile(const LinearArgs& args, size_t stripe, Use use) {
  const size_t stop = (stripe + 1) * args.stripe, end = stop < args.rows ? stop : args.rows;
  for (size_t row = stripe * args.stripe; row < end;) {
    const size_t height = tile_height(args, end - row);
    use(row, height);
    row += height;
  }
}

// ---- activations ----------------------------------------------------------------------------------------------------

// Where a row goes in its tile: a run of it follows the same run of the row before.
template <size_t kBlock>
struct TileRow {
  char* x;
  float* scale;
  float* sum;
  int32_t* start;
  size_t height;
  size_t block_bytes;
  int32_t zero;  // what the product sees in place of the code 0

  TileRow(const LinearArgs& args, const Tiles& tiles, size_t base, size_t row, size_t height)
      : height(height), block_bytes(kBlock * args.x_bytes) {
    const size_t first = base * args.blocks() + row;
    x = tiles.x + first * block_bytes;
    scale = tiles.scale + first;
    sum = tiles.sum + first;
    start = tiles.start + base * args.blocks() * kDigitsOfFloat + row;
    zero = args.bits == 8 ? simd::kByteZero : args.nibble_zero();
  }

  char* block(size_t index) const { return x + index * height * block_bytes; }

  // A block of rounded values, which add up to `total` times `step`.
  void set_sum(size_t index, float step, int32_t total) const {
    const size_t at = index * height;
    scale[at] = step;
    sum[at] = step * static_cast<float>(total);
    start[at] = -total * zero;
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

// Rounds up to 16 times 32 inputs to nearest, so that max|x| becomes 127: their divisions are done at once.
template <bool kNorm, size_t kBlock>
JAXOPT_INLINE void round_groups(const InputRow<kNorm>& from, const TileRow<kBlock>& to, size_t first, size_t count) {
  float scale[kLanes] = {}, step[kLanes], inverse[kLanes];
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (first + i) * kRounded;
    scale[i] = simd::reduce_magnitudes(simd::max_magnitude(from.at(at), from.at(at + kLanes)));
  }
  const F32 scales = simd::div(simd::load(scale), simd::broadcast(127.0f));
  const F32 steps = simd::max(scales, simd::broadcast(kSmallest));  // a group of zeros has zeros for codes
  simd::store(scale, scales);
  simd::store(step, steps);
  simd::store(inverse, simd::div(simd::broadcast(1.0f), steps));
  for (size_t i = 0; i < count; ++i) {
    const size_t at = (first + i) * kRounded, block = at / kBlock, last = (at + kLanes) / kBlock;
    const F32 divisor = simd::broadcast(step[i]), factor = simd::broadcast(inverse[i]);
    const I32 a = simd::clip(simd::round(simd::divide(from.at(at), divisor, factor)), 127);
    const I32 b = simd::clip(simd::round(simd::divide(from.at(at + kLanes), divisor, factor)), 127);
    simd::store_bytes(reinterpret_cast<int8_t*>(to.block(block)), a);
    simd::store_bytes(reinterpret_cast<int8_t*>(to.block(last)) + kLanes % kBlock, b);
    if constexpr (kBlock == kRounded) {
      to.set_sum(block, scale[i], simd::reduce_add(simd::add(a, b)));
    } else {
      to.set_sum(block, scale[i], simd::reduce_add(a));
      to.set_sum(last, scale[i], simd::reduce_add(b));
    }
  }
}

template <bool kNorm, size_t kBlock>
void prepare_rounded(const LinearArgs& args, size_t row, TileRow<kBlock> to) {
  const InputRow<kNorm> from(args, row);
  const size_t groups = args.inputs / kRounded;
  size_t group = 0;
  for (; group + kLanes <= groups; group += kLanes) round_groups(from, to, group, kLanes);
  round_groups(from, to, group, groups - group);
}

template <bool kNorm, size_t kBlock>
void prepare_plain(const LinearArgs& args, size_t row, TileRow<kBlock> to) {
  const InputRow<kNorm> from(args, row);
  for (size_t i = 0; i < args.blocks(); ++i) {
    float* values = reinterpret_cast<float*>(to.block(i));
    F32 sum = simd::zero();
    for (size_t j = 0; j < kBlock; j += kLanes) {
      const F32 value = from.at(i * kBlock + j);
      simd::store(values + j, value);
      sum = simd::add(sum, value);
    }
    to.sum[i * to.height] = simd::reduce_add(sum);
  }
}

// A run as fixed-point numbers of three digits, which keep as much of its largest value as a float does.
constexpr float kMostDigits = 127 * kBase * kBase;

template <bool kNorm, size_t kBlock>
JAXOPT_INLINE void round_run(const InputRow<kNorm>& from, const TileRow<kBlock>& to, size_t run, size_t first,
                             size_t blocks) {
  const size_t begin = first * kBlock, end = begin + blocks * kBlock;
  F32 most = simd::zero();
  for (size_t i = begin; i < end; i += kLanes) most = simd::max_magnitude(most, from.at(i));
  const float finest = simd::reduce_magnitudes(most) / kMostDigits, scale = finest < kSmallest ? kSmallest : finest;
  const F32 inverse = simd::broadcast(1.0f / scale);
  const F32 factor[] = {simd::broadcast(1 / (kBase * kBase)), simd::broadcast(1 / kBase), simd::broadcast(1.0f)};
  const F32 weight[] = {simd::broadcast(-kBase * kBase), simd::broadcast(-kBase), simd::broadcast(-1.0f)};

  F32 sum = simd::zero();
  I32 digits[kDigitsOfFloat] = {simd::broadcast(0), simd::broadcast(0), simd::broadcast(0)};
  for (size_t i = begin; i < end; i += kLanes) {
    const F32 value = from.at(i);
    sum = simd::add(sum, value);
    F32 rest = simd::mul(value, inverse);
    char* codes = to.block(i / kBlock) + i % kBlock;
    JAXOPT_UNROLL
    for (size_t d = 0; d < kDigitsOfFloat; ++d) {
      const I32 digit = simd::round(simd::mul(rest, factor[d]));
      rest = simd::fma(simd::to_float(digit), weight[d], rest);  // exact
      digits[d] = simd::add(digits[d], digit);
      simd::store_bytes(reinterpret_cast<int8_t*>(codes) + d * kBlock, digit);
    }
  }
  to.scale[run * to.height] = scale;
  to.sum[run * to.height] = simd::reduce_add(sum);
  for (size_t d = 0; d < kDigitsOfFloat; ++d) {
    to.start[(run * kDigitsOfFloat + d) * to.height] = -simd::reduce_add(digits[d]) * to.zero;
  }
}

template <bool kNorm, size_t kBlock>
void prepare_digits(const LinearArgs& args, size_t row, TileRow<kBlock> to) {
  const InputRow<kNorm> from(args, row);
  const size_t blocks = args.blocks_per_scale(), most = args.blocks_per_run();
  for (size_t block = 0, run = 0; block < args.blocks(); ++run) {
    const size_t left = blocks - block % blocks, length = left < most ? left : most;
    round_run(from, to, run, block, length);
    block += length;
  }
}

template <bool kNorm, size_t kBlock>
auto prepare_row(const LinearArgs& args) {
  if (args.round) return prepare_rounded<kNorm, kBlock>;
  if constexpr (simd::kDigits) return prepare_digits<kNorm, kBlock>;
  else return prepare_plain<kNorm, kBlock>;
}

template <size_t kBlock>
void prepare_blocks(const LinearArgs& args, const Tiles& tiles, size_t stripe) {
  const auto prepare = args.gain != nullptr ? prepare_row<true, kBlock>(args) : prepare_row<false, kBlock>(args);
  for_each_tile(args, stripe, [&](size_t base, size_t height) {
    for (size_t row = 0; row < height; ++row) {
      prepare(args, base + row, TileRow<kBlock>(args, tiles, base, row, height));
    }
  });
}

void prepare(const LinearArgs& args, const Tiles& tiles, size_t stripe) {
  return args.block == kRounded ? prepare_blocks<kRounded>(args, tiles, stripe)
                                : prepare_blocks<kRounded / 2>(args, tiles, stripe);
}

// ---- weights --------------------------------------------------------------------------------------------------------

template <size_t kInputs, size_t kVectorBytes>
struct BlockForm {
  static constexpr size_t kBlock = kInputs;
  static constexpr size_t kVectors = kBlock / 4;  // of four inputs
  static constexpr size_t kBlockBytes = kVectorBytes * kVectors;
};

// `vector(codes, k)` is the k-th vector of the block that starts there.
template <size_t kInputs>
struct ByteForm : BlockForm<kInputs, 64> {
  using Vector = simd::Bytes;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    return simd::bytes(simd::load_codes(codes + 64 * k));
  }
};

template <size_t kInputs>
struct NibbleForm : BlockForm<kInputs, 32> {
  using Vector = simd::Nibbles;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    const simd::Codes pair = simd::load_codes(codes + 64 * (k / 2));
    return k % 2 == 0 ? simd::low_nibbles(pair) : simd::high_nibbles(pair);
  }
};

// Nibbles that `unpack` has made bytes of.
template <size_t kInputs>
struct UnpackedForm : BlockForm<kInputs, 64> {
  using Vector = simd::Nibbles;

  static JAXOPT_INLINE Vector vector(const uint8_t* codes, size_t k) {
    return simd::nibbles(simd::load_codes(codes + 64 * k));
  }
};

inline void unpack(const uint8_t* nibbles, size_t pairs, uint8_t* bytes) {
  for (size_t i = 0; i < pairs; ++i) {
    const simd::Codes pair = simd::load_codes(nibbles + 64 * i);
    simd::store_codes(bytes + 128 * i, simd::low_nibbles(pair));
    simd::store_codes(bytes + 128 * i + 64, simd::high_nibbles(pair));
  }
}

// ---- a tile: some panels with some rows -----------------------------------------------------------------------------

// Some panels, block after block.
template <class Form, size_t kPanels>
struct Weights {
  const uint8_t* codes[kPanels];
  F32 scale[kPanels];
  bool from_memory;

  JAXOPT_INLINE void next() {
    if (from_memory) {  // hardware stops fetching ahead at the end of each page
      JAXOPT_UNROLL
      for (size_t line = 0; line < Form::kBlockBytes; line += 64) simd::prefetch(codes[0] + kAhead + line);
    }
    JAXOPT_UNROLL
    for (const uint8_t*& block : codes) block += Form::kBlockBytes;
  }
};

// Rows of a tile whose sums are computed in one pass over a block, which then lies in the first-level cache. Passes are
// a loop: unrolled, the compiler would keep what one has made of the codes for the next, and not in registers.
template <size_t kRows>
constexpr size_t kTogether = kRows < simd::kSumRows ? kRows : simd::kSumRows;

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

// A tile's rows of integers, run after run: rounded to one digit, where a run is a block, or of all digits.
template <class Form, size_t kPanels, size_t kRows, size_t kDigits>
struct IntegerRows {
  // A dot waits for the one before it: with few rows a long run has several sums for the processor to work at.
  static constexpr size_t kSums = kDigits == 1 || kRows > 4 ? 1 : 4 / kRows;
  using RowSums = simd::Sum<typename Form::Vector>[kSums][kDigits];
  static constexpr size_t kPass = kTogether<kRows>;
  static_assert(kDigits == 1 || kPass == kRows, "one pass over a run of many blocks");

  const int8_t* x;
  const float* scale;
  const int32_t* start;
  size_t run;  // blocks, at most

  IntegerRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(reinterpret_cast<const int8_t*>(tiles.x) + base * args.inputs * kDigits),
        scale(tiles.scale + base * args.blocks()),
        start(tiles.start + base * args.blocks() * kDigitsOfFloat),
        run(kDigits == 1 ? 1 : args.blocks_per_run()) {}

  // Adds the products of a run of so many blocks.
  JAXOPT_INLINE void next(Weights<Form, kPanels>& weights, F32 (&total)[kPanels][kRows], size_t blocks) {
    for (size_t first = 0; first < kRows; first += kPass) {
      RowSums sum[kPanels][kPass];
      JAXOPT_UNROLL
      for (size_t r = 0; r < kPass; ++r) {
        JAXOPT_UNROLL
        for (size_t p = 0; p < kPanels; ++p) begin(sum[p][r], start + first + r);
      }
      for (size_t b = 0; b < (kDigits == 1 ? 1 : blocks); ++b) {
        add_block(weights, x + first * kDigits * Form::kBlock, sum);
        if (first + kPass == kRows) step(weights);
      }
      JAXOPT_UNROLL
      for (size_t r = 0; r < kPass; ++r) {
        const F32 row_scale = simd::broadcast(scale[first + r]);
        JAXOPT_UNROLL
        for (size_t p = 0; p < kPanels; ++p) {
          const F32 sum_value = value(sum[p][r], start + first + r);
          F32& own = total[p][first + r];
          own = simd::fma(sum_value, simd::mul(weights.scale[p], row_scale), own);
        }
      }
    }
    scale += kRows;
    start += kRows * kDigits;
  }

  static JAXOPT_INLINE void begin(RowSums& sums, const int32_t* start) {
    JAXOPT_UNROLL
    for (size_t i = 0; i < kSums; ++i) {
      JAXOPT_UNROLL
      for (size_t d = 0; d < kDigits; ++d) simd::begin(sums[i][d], i == 0 ? start[d * kRows] : 0);
    }
  }

  static JAXOPT_INLINE F32 value(const RowSums& sums, const int32_t* start) {
    F32 result;
    JAXOPT_UNROLL
    for (size_t d = 0; d < kDigits; ++d) {
      I32 digit = simd::end(sums[0][d], start[d * kRows]);
      JAXOPT_UNROLL
      for (size_t i = 1; i < kSums; ++i) digit = simd::add(digit, simd::end(sums[i][d], 0));
      const F32 next = simd::to_float(digit);
      result = d == 0 ? next : simd::fma(result, simd::broadcast(kBase), next);
    }
    return result;
  }

  JAXOPT_INLINE void step(Weights<Form, kPanels>& weights) {
    weights.next();
    x += Form::kBlock * kRows * kDigits;
  }

  static JAXOPT_INLINE void add_block(const Weights<Form, kPanels>& weights, const int8_t* x,
                                      RowSums (&sum)[kPanels][kPass]) {
    JAXOPT_UNROLL
    for (size_t k = 0; k < Form::kVectors; ++k) {
      typename Form::Vector vector[kPanels];
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) vector[p] = Form::vector(weights.codes[p], k);
      JAXOPT_UNROLL
      for (size_t r = 0; r < kPass; ++r) {
        JAXOPT_UNROLL
        for (size_t d = 0; d < kDigits; ++d) {
          const simd::Four four = simd::four_inputs(x + (r * kDigits + d) * Form::kBlock + 4 * k);
          JAXOPT_UNROLL
          for (size_t p = 0; p < kPanels; ++p) {
            auto& own = sum[p][r][k % kSums][d];
            own = simd::dot(own, vector[p], four);
          }
        }
      }
    }
  }
};

template <class Form, size_t kPanels, size_t kRows>
using RoundedRows = IntegerRows<Form, kPanels, kRows, 1>;
template <class Form, size_t kPanels, size_t kRows>
using DigitRows = IntegerRows<Form, kPanels, kRows, kDigitsOfFloat>;

// Rows that are neither rounded nor digits.
template <class Form, size_t kPanels, size_t kRows>
struct PlainRows {
  static constexpr size_t kPass = kTogether<kRows>;
  static constexpr size_t run = 1;
  const float* x;
  int32_t zero;

  PlainRows(const LinearArgs& args, const Tiles& tiles, size_t base)
      : x(reinterpret_cast<const float*>(tiles.x) + base * args.inputs), zero(args.nibble_zero()) {}

  JAXOPT_INLINE void next(Weights<Form, kPanels>& weights, F32 (&total)[kPanels][kRows], size_t) {
    for (size_t first = 0; first < kRows; first += kPass) {
      F32 sum[kPanels][kPass];
      clear(sum);
      JAXOPT_UNROLL
      for (size_t k = 0; k < Form::kVectors; ++k) {
        typename Form::Vector vector[kPanels];
        JAXOPT_UNROLL
        for (size_t p = 0; p < kPanels; ++p) vector[p] = Form::vector(weights.codes[p], k);
        JAXOPT_UNROLL
        for (int j = 0; j < 4; ++j) {
          F32 value[kPanels];
          JAXOPT_UNROLL  // `code` is looked up with its argument: where rows are digits there is none
          for (size_t p = 0; p < kPanels; ++p) value[p] = code(vector[p], j, zero);
          JAXOPT_UNROLL
          for (size_t r = 0; r < kPass; ++r) {
            const F32 input = simd::broadcast(x[(first + r) * Form::kBlock + 4 * k + j]);
            JAXOPT_UNROLL
            for (size_t p = 0; p < kPanels; ++p) sum[p][r] = simd::fma(value[p], input, sum[p][r]);
          }
        }
      }
      JAXOPT_UNROLL
      for (size_t p = 0; p < kPanels; ++p) {
        JAXOPT_UNROLL
        for (size_t r = 0; r < kPass; ++r) {
          F32& own = total[p][first + r];
          own = simd::fma(sum[p][r], weights.scale[p], own);
        }
      }
    }
    weights.next();
    x += Form::kBlock * kRows;
  }
};

// Sums of panels from `panel` on, whose codes begin at `codes`: of each, 16 outputs a row.
template <template <class, size_t, size_t> class Rows, class Form, bool kMinimum, size_t kPanels, size_t kRows>
void multiply_tile(const LinearArgs& args, const Tiles& tiles, const uint8_t* codes, size_t panel, size_t base,
                   Sums* out) {
  const size_t blocks = args.blocks(), scales = args.scales, blocks_per_scale = args.blocks_per_scale();
  const float* x_sum = tiles.sum + base * blocks;
  Rows<Form, kPanels, kRows> rows(args, tiles, base);

  Weights<Form, kPanels> weights;
  weights.from_memory = base == 0 && kPanels == 1;  // later tiles find the panel in cache
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
    for (size_t b = 0; b < blocks_per_scale; b += rows.run) {
      const size_t left = blocks_per_scale - b;
      rows.next(weights, total, left < rows.run ? left : rows.run);
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
  if constexpr (kPanels == 1) {
    if constexpr (simd::kDigits) {
      if (!args.round) return multiply_tile<DigitRows, Form, kMinimum, kPanels, kRows>;
    } else {
      if (!args.round) return multiply_tile<PlainRows, Form, kMinimum, kPanels, kRows>;
    }
  }
  return multiply_tile<RoundedRows, Form, kMinimum, kPanels, kRows>;
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

// A few groups with a chunk's rows. Few rows wait for memory, and read it as it lies, a panel after another.
template <class Form>
void multiply_groups(const LinearArgs& args, const Tiles& tiles, const uint8_t* codes, size_t first_group,
                     size_t groups, size_t first_stripe, size_t last_stripe) {
  const size_t per_group = args.panels_per_group(), panels = groups * per_group, first = first_group * per_group;
  const bool many = args.round && is_tall(first_stripe, last_stripe) && panels >= simd::kTilePanels;
  const size_t wide = many ? simd::kTilePanels : 1;  // with floats the registers are full of one
  Sums sums[kMostPanels];
  for (size_t stripe = first_stripe; stripe < last_stripe; ++stripe) {
    for_each_tile(args, stripe, [&](size_t base, size_t height) {
      const TileFunction tile = tile_function<Form>(args, wide, height);
      for (size_t p = 0; p < panels; p += wide) {
        tile(args, tiles, codes + p * args.blocks() * Form::kBlockBytes, first + p, base, sums + p);
      }
      finish_tile(args, first_group, groups, base, height, sums);
    });
  }
}

template <size_t kBlock>
void multiply_blocks(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group,
                     size_t first_stripe, size_t last_stripe, uint8_t* unpacked) {
  const size_t per_group = args.panels_per_group(), most = kMostPanels / per_group;
  for (size_t group = first_group; group < last_group; group += most) {
    const size_t left = last_group - group, groups = left < most ? left : most;
    const uint8_t* codes = args.codes + group * per_group * kLanes * args.inputs * args.bits / 8;
    if (args.bits == 8) {
      multiply_groups<ByteForm<kBlock>>(args, tiles, codes, group, groups, first_stripe, last_stripe);
    } else if (is_tall(first_stripe, last_stripe)) {
      unpack(codes, groups * per_group * args.inputs / 8, unpacked);
      multiply_groups<UnpackedForm<kBlock>>(args, tiles, unpacked, group, groups, first_stripe, last_stripe);
    } else {
      multiply_groups<NibbleForm<kBlock>>(args, tiles, codes, group, groups, first_stripe, last_stripe);
    }
  }
}

void multiply(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group, size_t first_stripe,
              size_t last_stripe, uint8_t* unpacked) {
  const auto multiply = args.block == kRounded ? multiply_blocks<kRounded> : multiply_blocks<kRounded / 2>;
  multiply(args, tiles, first_group, last_group, first_stripe, last_stripe, unpacked);
}

size_t stripe(const LinearArgs&) { return simd::kTileRows[0]; }

inline jaxopt::LinearKernels linear_kernels() {
  return {stripe, simd::kDigits ? kDigitsOfFloat : sizeof(float), prepare, multiply};
}

}  // namespace
