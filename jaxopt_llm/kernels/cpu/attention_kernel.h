// Attention itself, over any simd_*.h. See attention.h for layouts and for the order in which things are summed.
#pragma once

#include "attention.h"
#include "floats.h"

namespace {

using jaxopt::AttentionArgs;
using jaxopt::kGroup;
using jaxopt::kKeys;
using jaxopt::kMaxWidth;
using jaxopt::PageType;
using jaxopt::part_size;
using jaxopt::Run;
using jaxopt::Work;

constexpr size_t kGroups = kKeys / kGroup;
constexpr size_t kQueries = 6;  // of a register tile, at most; beside kTileVectors vectors of keys or of values
constexpr float kUnseen = -1e30f;  // the score of a key that a query does not see; finite, as differences are taken

inline F32 load(const float* p) { return simd::load_once(p); }
inline F32 load(const uint16_t* p) { return simd::load_bf16(p); }
inline F32 load(const int8_t* p) { return simd::load_i8(p); }

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// ---- writing -------------------------------------------------------------------------------------------------------

inline void convert(float x, float* to) { *to = x; }
inline void convert(float x, uint16_t* to) { *to = to_bf16(x); }
inline void convert(float x, int8_t* to) { *to = static_cast<int8_t>(x); }

// Makes codes of `x`, to nearest, and returns their scale: max|x| becomes 127.
inline float round_to_codes(float* x, size_t width) {
  F32 top = simd::zero();
  for (size_t i = 0; i < width; i += kLanes) {
    const F32 value = simd::load(x + i);
    top = simd::max(top, simd::max(value, simd::sub(simd::zero(), value)));
  }
  const float scale = simd::reduce_max(top) / 127.0f;
  const F32 divisor = simd::broadcast(scale == 0.0f ? 1.0f : scale);
  for (size_t i = 0; i < width; i += kLanes) {
    const I32 codes = simd::clip(simd::round(simd::div(simd::load(x + i), divisor)), 127);
    simd::store(x + i, simd::to_float(codes));
  }
  return scale;
}

template <class T>
void write_as(const AttentionArgs& args, size_t token) {
  const int64_t position = args.positions[token];
  const size_t page = args.page(args.slots[token], position);
  if (page >= args.page_count) return;
  const size_t place = static_cast<size_t>(position) % args.page_size;
  for (size_t head = 0; head < args.heads; ++head) {
    const size_t from = (token * args.heads + head) * args.width;
    const size_t tokens = (page * args.heads + head) * args.page_size;  // before this head's
    float row[kMaxWidth];
    const auto read = [&](jaxopt::Floats source, float* scales) {
      for (size_t i = 0; i < args.width; i += kLanes) simd::store(row + i, load_floats(source, (from + i) / kLanes));
      if (args.type == PageType::kI8) scales[tokens + place] = round_to_codes(row, args.width);
    };
    read(args.k, args.key_scales);
    T* keys = static_cast<T*>(args.key_pages) + (tokens + place / kGroup * kGroup) * args.width + place % kGroup;
    for (size_t i = 0; i < args.width; ++i) convert(row[i], keys + i * kGroup);
    read(args.v, args.value_scales);
    T* values = static_cast<T*>(args.value_pages) + (tokens + place) * args.width;
    for (size_t i = 0; i < args.width; ++i) convert(row[i], values + i);
  }
}

void write(const AttentionArgs& args, size_t token) {
  switch (args.type) {
    case PageType::kF32: return write_as<float>(args, token);
    case PageType::kBF16: return write_as<uint16_t>(args, token);
    case PageType::kI8: return write_as<int8_t>(args, token);
  }
}

// ---- one block of keys with one tile of queries ---------------------------------------------------------------------

// Where a block's keys and values are, 16 tokens after 16. Groups that nobody sees repeat one that somebody does.
template <class T>
struct Block {
  int64_t start;                     // its first position
  const T* keys[kGroups];            // [width][16]
  const T* values[kGroups];          // [16][width]
  const float* key_scales[kGroups];  // null but for codes
  const float* value_scales[kGroups];
  const T* next_keys[kGroups];  // of the block after this, to be fetched ahead
};

// Asks for the vector in `ahead` that lies as `at` does in `from`: what is read next, at the pace of what is read now.
template <class T>
inline void fetch(const T* at, const T* from, const T* ahead) {
  constexpr size_t kLine = 64;
  const size_t bytes = (at - from) * sizeof(T);
  if (sizeof(T) * kLanes == kLine || bytes % kLine == 0) {
    __builtin_prefetch(reinterpret_cast<const char*>(ahead) + bytes, 0, 2);
  }
}

// A part of the result; see `part_size`.
struct Part {
  float* out;
  size_t width;

  float* sums() const { return out + width; }
  float& top() const { return out[width + kGroup]; }

  void clear() const {
    for (size_t i = 0; i < width + kGroup; ++i) out[i] = 0.0f;
    top() = kUnseen;
  }
};

// Keys of a block from `begin` up to `end`, counted from its start.
struct Range {
  size_t begin, end;
};

inline Range seen(const AttentionArgs& args, int64_t first_position, int64_t last_position, int64_t start) {
  return {static_cast<size_t>(clamp(args.first_key(first_position) - start, 0, kKeys)),
          static_cast<size_t>(clamp(args.end_key(last_position) - start, 0, kKeys))};
}

// Lanes of `x`, the group's, that lie in the range; `other` in the rest.
inline F32 within(Range range, size_t group, F32 x, F32 other) {
  const int64_t first = group * kGroup, begin = range.begin, end = range.end;
  return simd::keep(x, static_cast<int>(clamp(begin - first, 0, kGroup)),
                    static_cast<int>(clamp(end - first, 0, kGroup)), other);
}

// scores[query][key]: products of scaled queries [width][kRows] with the groups of keys that the range touches.
template <class T, size_t kRows>
void score(const AttentionArgs& args, const Block<T>& block, const float* queries, Range range, float* scores) {
  constexpr size_t kWide = simd::kTileVectors;
  for (size_t group = range.begin / kGroup / kWide * kWide; group * kGroup < range.end; group += kWide) {
    const T *keys[kWide], *values[kWide];
    JAXOPT_UNROLL
    for (size_t j = 0; j < kWide; ++j) {
      keys[j] = block.keys[group + j];
      values[j] = block.values[group + j];
    }
    F32 sum[kRows][kWide];
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) {
      JAXOPT_UNROLL
      for (size_t j = 0; j < kWide; ++j) sum[r][j] = simd::zero();
    }
    for (size_t i = 0; i < args.width; ++i) {
      F32 key[kWide];
      JAXOPT_UNROLL
      for (size_t j = 0; j < kWide; ++j) {
        key[j] = load(keys[j] + i * kGroup);
        fetch(keys[j] + i * kGroup, keys[j], values[j]);
      }
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) {
        const F32 query = simd::broadcast(queries[i * kRows + r]);
        JAXOPT_UNROLL
        for (size_t j = 0; j < kWide; ++j) sum[r][j] = simd::fma(query, key[j], sum[r][j]);
      }
    }
    JAXOPT_UNROLL
    for (size_t r = 0; r < kRows; ++r) {
      JAXOPT_UNROLL
      for (size_t j = 0; j < kWide; ++j) simd::store(scores + r * kKeys + (group + j) * kGroup, sum[r][j]);
    }
  }
}

inline F32 tanh(F32 x) {
  return simd::sub(simd::mul(simd::broadcast(2.0f), sigmoid(simd::add(x, x))), simd::broadcast(1.0f));
}

// Calls `use(group)` for every group of a block.
template <class Use>
inline void each_group(Use use) {
  JAXOPT_UNROLL
  for (size_t group = 0; group < kGroups; ++group) use(group);
}

// One query's scores become weights, relative to the largest.
template <class T>
inline void soften(const AttentionArgs& args, const Block<T>& block, Range range, float* scores, Part part) {
  const bool all = range.begin == 0 && range.end == kKeys, scaled = args.type == PageType::kI8;
  F32 x[kGroups];
  each_group([&](size_t g) { x[g] = simd::load(scores + g * kGroup); });
  if (scaled) each_group([&](size_t g) { x[g] = simd::mul(x[g], simd::load(block.key_scales[g])); });
  if (args.softcap > 0.0f) {
    const F32 cap = simd::broadcast(args.softcap), inverse = simd::broadcast(1.0f / args.softcap);
    each_group([&](size_t g) { x[g] = simd::mul(cap, tanh(simd::mul(x[g], inverse))); });
  }
  if (!all) each_group([&](size_t g) { x[g] = within(range, g, x[g], simd::broadcast(kUnseen)); });

  F32 top = x[0];
  each_group([&](size_t g) { top = simd::max(top, x[g]); });
  part.top() = simd::reduce_max(top);
  const F32 unit = simd::broadcast(part.top());
  each_group([&](size_t g) { x[g] = exp(simd::sub(x[g], unit)); });
  if (!all) each_group([&](size_t g) { x[g] = within(range, g, x[g], simd::zero()); });
  F32 sum = simd::zero();
  each_group([&](size_t g) { sum = simd::add(sum, x[g]); });
  simd::store(part.sums(), sum);

  if (scaled) {
    each_group([&](size_t g) { x[g] = simd::mul(x[g], simd::load(block.value_scales[g])); });
    if (!all) each_group([&](size_t g) { x[g] = within(range, g, x[g], simd::zero()); });
  }
  each_group([&](size_t g) { simd::store(scores + g * kGroup, x[g]); });
}

// out[features] += what one query's keys in the range give.
template <class T>
inline void weigh_alone(size_t width, const Block<T>& block, const float* weights, Range range, float* out) {
  for (size_t key = range.begin; key < range.end; ++key) {
    const T* values = block.values[key / kGroup] + key % kGroup * width;
    const F32 weight = simd::broadcast(weights[key]);
    for (size_t i = 0; i < width; i += kLanes) {
      simd::store(out + i, simd::fma(weight, load(values + i), simd::load(out + i)));
    }
  }
}

// out[query][features] += what keys that all see give: `kWide` vectors of features, from `first` on.
template <class T, size_t kRows, size_t kWide>
inline void weigh(size_t width, const Block<T>& block, const float* weights, Range range, size_t first, float* out,
                  size_t stride) {
  F32 sum[kRows][kWide];
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) {
    JAXOPT_UNROLL
    for (size_t j = 0; j < kWide; ++j) sum[r][j] = simd::load(out + r * stride + first + j * kLanes);
  }
  for (size_t key = range.begin; key < range.end;) {
    const T *group = block.values[key / kGroup], *next = block.next_keys[key / kGroup];
    const T* values = group + key % kGroup * width + first;
    const size_t end = smaller(range.end, (key / kGroup + 1) * kGroup);
    for (; key < end; ++key, values += width) {
      F32 value[kWide];
      JAXOPT_UNROLL
      for (size_t j = 0; j < kWide; ++j) {
        value[j] = load(values + j * kLanes);
        fetch(values + j * kLanes, group, next);
      }
      JAXOPT_UNROLL
      for (size_t r = 0; r < kRows; ++r) {
        const F32 weight = simd::broadcast(weights[r * kKeys + key]);
        JAXOPT_UNROLL
        for (size_t j = 0; j < kWide; ++j) sum[r][j] = simd::fma(weight, value[j], sum[r][j]);
      }
    }
  }
  JAXOPT_UNROLL
  for (size_t r = 0; r < kRows; ++r) {
    JAXOPT_UNROLL
    for (size_t j = 0; j < kWide; ++j) simd::store(out + r * stride + first + j * kLanes, sum[r][j]);
  }
}

// ---- the queries of a run -------------------------------------------------------------------------------------------

// Rows are the run's queries of one head: those of a token follow one another.
struct Rows {
  const AttentionArgs& args;
  const Work& work;

  size_t per_token() const { return args.queries_per_head(); }
  size_t count() const { return work.run.count * per_token(); }
  int64_t position(size_t row) const { return work.run.position + static_cast<int64_t>(row / per_token()); }
  size_t query_head(size_t row) const { return work.head * per_token() + row % per_token(); }
  // Where the row starts in q and out.
  size_t place(size_t row) const {
    return ((work.run.token + row / per_token()) * args.query_heads + query_head(row)) * args.width;
  }
  Range seen(size_t first, size_t last, int64_t start) const {
    return ::seen(args, position(first), position(last), start);
  }
};

template <class T, size_t kRows>
void tile(const Rows& rows, const Block<T>& block, size_t first, const float* queries, float* parts) {
  const AttentionArgs& args = rows.args;
  const size_t stride = part_size(args);
  const size_t last = first + kRows - 1;
  const Range range = rows.seen(first, last, block.start);
  // The first row is the last to see a key, and the last row the first to lose sight of one.
  Range common = {rows.seen(last, last, block.start).begin, rows.seen(first, first, block.start).end};
  if (common.begin >= common.end) common = {kKeys, kKeys};
  const bool all = common.begin == 0 && common.end == kKeys;
  alignas(64) float scores[kRows * kKeys];
  score<T, kRows>(args, block, queries, range, scores);
  for (size_t r = 0; r < kRows; ++r) {
    const Range own = all ? Range{0, kKeys} : rows.seen(first + r, first + r, block.start);
    const Part part{parts + r * stride, args.width};
    soften(args, block, own, scores + r * kKeys, part);
    for (size_t i = 0; i < args.width; i += kLanes) simd::store(part.out + i, simd::zero());
    weigh_alone(args.width, block, scores + r * kKeys, Range{own.begin, smaller(own.end, common.begin)}, part.out);
  }
  size_t feature = 0;
  for (; feature + simd::kTileVectors * kLanes <= args.width; feature += simd::kTileVectors * kLanes) {
    weigh<T, kRows, simd::kTileVectors>(args.width, block, scores, common, feature, parts, stride);
  }
  for (; feature < args.width; feature += kLanes) {
    weigh<T, kRows, 1>(args.width, block, scores, common, feature, parts, stride);
  }
  // Keys that some see and some do not: a value that is no number stays with those that see it.
  for (size_t r = 0; r < kRows && !all; ++r) {
    const size_t end = rows.seen(first + r, first + r, block.start).end;
    weigh_alone(args.width, block, scores + r * kKeys, Range{common.end, end}, parts + r * stride);
  }
}

template <class T>
void tile(const Rows& rows, const Block<T>& block, size_t first, size_t height, const float* queries, float* parts) {
  switch (height) {
    case 1: return tile<T, 1>(rows, block, first, queries, parts);
    case 2: return tile<T, 2>(rows, block, first, queries, parts);
    case 3: return tile<T, 3>(rows, block, first, queries, parts);
    case 4: return tile<T, 4>(rows, block, first, queries, parts);
    case 5: return tile<T, 5>(rows, block, first, queries, parts);
    default: return tile<T, 6>(rows, block, first, queries, parts);
  }
}

// Adds what later keys gave rows to what earlier ones did. The larger of both scores stays the unit of weights.
inline void merge(float* into, const float* from, size_t rows, size_t width, size_t stride) {
  const size_t size = width + kGroup, top = size;  // see Part
  float gain[kLanes] = {}, factor[kLanes];
  for (size_t r = 0; r < rows; ++r) gain[r] = from[r * stride + top] - into[r * stride + top];
  const F32 gains = simd::load(gain);
  simd::store(factor, exp(simd::min(gains, simd::sub(simd::zero(), gains))));
  for (size_t r = 0; r < rows; ++r, into += stride, from += stride) {
    const bool gained = gain[r] > 0.0f;
    const F32 old = simd::broadcast(gained ? factor[r] : 1.0f), fresh = simd::broadcast(gained ? 1.0f : factor[r]);
    for (size_t i = 0; i < size; i += kLanes) {
      simd::store(into + i, simd::fma(simd::load(from + i), fresh, simd::mul(simd::load(into + i), old)));
    }
    if (gained) into[top] = from[top];
  }
}

// A row's result: its sum of values over its sum of weights. A row that saw nothing is zero.
inline void finish_row(const Rows& rows, size_t row, Part part) {
  float total = simd::reduce_add(simd::load(part.sums())), factor = 1.0f;
  if (rows.args.sinks != nullptr) {
    const float sink = rows.args.sinks[rows.query_head(row)];
    const float top = part.top() > sink ? part.top() : sink;
    float exponentials[2 * kLanes];
    simd::store(exponentials, exp(simd::broadcast(part.top() - top)));
    simd::store(exponentials + kLanes, exp(simd::broadcast(sink - top)));
    factor = exponentials[0];
    total = total * factor + exponentials[kLanes];
  }
  const F32 share = simd::broadcast(total == 0.0f ? 0.0f : factor / total);
  for (size_t i = 0; i < part.width; i += kLanes) {
    store_floats(rows.args.out, rows.args.q.type, rows.place(row) + i, simd::mul(simd::load(part.out + i), share));
  }
}

// The queries of each tile, scaled, as [width][height].
inline void pack_queries(const Rows& rows, float* to) {
  const AttentionArgs& args = rows.args;
  const F32 scale = simd::broadcast(args.scale);
  for (size_t first = 0; first < rows.count(); first += kQueries) {
    const size_t height = smaller(kQueries, rows.count() - first);
    for (size_t r = 0; r < height; ++r) {
      const size_t from = rows.place(first + r);
      for (size_t i = 0; i < args.width; i += kLanes) {
        float lanes[kLanes];
        simd::store(lanes, simd::mul(load_floats(args.q, (from + i) / kLanes), scale));
        for (size_t j = 0; j < kLanes; ++j) to[first * args.width + (i + j) * height + r] = lanes[j];
      }
    }
  }
}

// The index-th block of keys: where the groups lie that the rows see.
template <class T>
Block<T> find_block(const Rows& rows, size_t index) {
  const AttentionArgs& args = rows.args;
  Block<T> block{};
  block.start = index * kKeys;
  const Range range = rows.seen(0, rows.count() - 1, block.start);
  const size_t first = range.begin / kGroup, last = (range.end - 1) / kGroup;
  for (size_t g = 0; g < kGroups; ++g) {
    const int64_t position = block.start + static_cast<int64_t>(kGroup * (g < first ? first : smaller(g, last)));
    const size_t page = smaller(args.page(rows.work.run.slot, position), args.page_count - 1);
    const size_t token = (page * args.heads + rows.work.head) * args.page_size + position % args.page_size;
    block.keys[g] = static_cast<const T*>(args.key_pages) + token * args.width;
    block.values[g] = static_cast<const T*>(args.value_pages) + token * args.width;
    if (args.type != PageType::kI8) continue;
    block.key_scales[g] = args.key_scales + token;
    block.value_scales[g] = args.value_scales + token;
  }
  return block;
}

// The same block as floats: many tiles read what is widened once.
template <class T>
Block<float> widen(const AttentionArgs& args, const Block<T>& block, float* to) {
  Block<float> wide{};
  wide.start = block.start;
  const size_t size = kGroup * args.width;
  for (size_t g = 0; g < kGroups; ++g) {
    float *keys = to + 2 * g * size, *values = keys + size;
    for (size_t i = 0; i < size; i += kLanes) {
      simd::store(keys + i, load(block.keys[g] + i));
      simd::store(values + i, load(block.values[g] + i));
    }
    wide.keys[g] = wide.next_keys[g] = keys;
    wide.values[g] = values;
    wide.key_scales[g] = block.key_scales[g];
    wide.value_scales[g] = block.value_scales[g];
  }
  return wide;
}
inline const Block<float>& widen(const AttentionArgs&, const Block<float>& block, float*) { return block; }

// What `attend` keeps beside its caller's memory.
struct Scratch {
  float* queries;  // [rows, width]
  float* merged;   // the rows' parts
  float* fresh;    // a tile's parts
  float* block;    // widened

  static size_t rows(const AttentionArgs& args) {
    return args.queries_per_head() > jaxopt::kRunRows ? args.queries_per_head() : jaxopt::kRunRows;
  }
  static size_t floats(const AttentionArgs& args) {
    return rows(args) * (args.width + part_size(args)) + kQueries * part_size(args) + 2 * kKeys * args.width;
  }
  Scratch(const AttentionArgs& args, void* memory) {
    queries = static_cast<float*>(memory);
    merged = queries + rows(args) * args.width;
    fresh = merged + rows(args) * part_size(args);
    block = fresh + kQueries * part_size(args);
  }
};

size_t scratch_bytes(const AttentionArgs& args) { return Scratch::floats(args) * sizeof(float); }

// Gives the part of each tile of rows to `use(first row, height, tile function of parts)`.
template <class T, class Use>
void each_tile(const Rows& rows, const Block<T>& block, const float* queries, Use use) {
  for (size_t first = 0; first < rows.count(); first += kQueries) {
    const size_t height = smaller(kQueries, rows.count() - first);
    use(first, height, [&](float* parts) {
      tile(rows, block, first, height, queries + first * rows.args.width, parts);
    });
  }
}

template <class T>
void attend_block(const Rows& rows, const Block<T>& block, size_t index, const Scratch& scratch) {
  const size_t stride = part_size(rows.args);
  each_tile(rows, block, scratch.queries, [&](size_t first, size_t height, auto compute) {
    if (rows.work.parts != nullptr) return compute(rows.work.parts + (index * rows.count() + first) * stride);
    compute(scratch.fresh);
    merge(scratch.merged + first * stride, scratch.fresh, height, rows.args.width, stride);
  });
}

template <class T>
void attend_as(const AttentionArgs& args, const Work& work, const Scratch& scratch) {
  const Rows rows{args, work};
  const size_t stride = part_size(args);
  pack_queries(rows, scratch.queries);
  if (work.parts == nullptr) {
    for (size_t row = 0; row < rows.count(); ++row) Part{scratch.merged + row * stride, args.width}.clear();
  }
  Block<T> next{};
  if (work.first_block < work.end_block) next = find_block<T>(rows, work.first_block);
  for (size_t index = work.first_block; index < work.end_block; ++index) {
    Block<T> block = next;
    if (index + 1 < work.end_block) next = find_block<T>(rows, index + 1);
    std::memcpy(block.next_keys, next.keys, sizeof next.keys);
    if (rows.count() <= kQueries) {
      attend_block(rows, block, index - work.first_block, scratch);
    } else {
      attend_block(rows, widen(args, block, scratch.block), index - work.first_block, scratch);
    }
  }
  if (work.parts != nullptr) return;
  for (size_t row = 0; row < rows.count(); ++row) {
    finish_row(rows, row, Part{scratch.merged + row * stride, args.width});
  }
}

void attend(const AttentionArgs& args, const Work& work, void* memory) {
  const Scratch scratch(args, memory);
  switch (args.type) {
    case PageType::kF32: return attend_as<float>(args, work, scratch);
    case PageType::kBF16: return attend_as<uint16_t>(args, work, scratch);
    case PageType::kI8: return attend_as<int8_t>(args, work, scratch);
  }
}

void finish(const AttentionArgs& args, const Work& work, void* memory) {
  const Scratch scratch(args, memory);
  const Rows rows{args, work};
  const size_t stride = part_size(args);
  for (size_t row = 0; row < rows.count(); ++row) {
    const Part merged{scratch.merged, args.width};
    merged.clear();
    for (size_t block = 0; block < work.blocks(); ++block) {
      merge(merged.out, work.parts + (block * rows.count() + row) * stride, 1, args.width, stride);
    }
    finish_row(rows, row, merged);
  }
}

inline jaxopt::AttentionKernels attention_kernels() { return {write, scratch_bytes, attend, finish}; }

}  // namespace
