// Ragged attention over pages: what its parts tell each other.
//
// Pages lie so that no sum runs across the lanes of a vector. A page holds `page_size` tokens, a multiple of 16, of every
// head:
//   keys    [pages][heads][page_size / 16][width][16]   a vector is one feature of 16 tokens
//   values  [pages][heads][page_size][width]            a vector is 16 features of one token
//   scales  [pages][heads][page_size]                   of keys or values that are stored as 8-bit codes
//
// Queries attend to blocks of 64 keys, which start at multiples of 64 positions. What a block gives, a `Part`, is
// merged with those of the blocks before it, first to last. A dot product is one chain over the features, a weighted sum
// one chain over the keys of a block. So a row has the same bits for every page size, chunk, neighbour and thread count.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"

namespace jaxopt {

constexpr size_t kKeys = 64;   // keys of a block
constexpr size_t kGroup = 16;  // keys of a vector
constexpr size_t kMaxWidth = 512;  // of a head

enum class PageType { kF32, kBF16, kI8 };

struct AttentionArgs {
  Floats q;     // [tokens, query_heads, width]
  Floats k, v;  // [tokens, heads, width], of the type of q
  size_t tokens, query_heads, heads, width;

  const int32_t* positions;  // [tokens]
  const int32_t* slots;      // [tokens]; out of range: padding
  const int32_t* table;      // [slot_count, slot_pages]
  size_t slot_count, slot_pages;

  PageType type;
  void *key_pages, *value_pages;
  float *key_scales, *value_scales;  // null but for codes
  size_t page_count, page_size;

  const float* sinks;  // [query_heads] or null
  float scale;
  float softcap;   // 0: none
  int64_t window;  // a query sees so many positions, its own the last

  void* out;  // as q

  size_t queries_per_head() const { return query_heads / heads; }
  // The page of a position; `page_count` or more where there is none.
  size_t page(int32_t slot, int64_t position) const {
    const size_t index = static_cast<size_t>(position) / page_size;
    const bool known = slot >= 0 && static_cast<size_t>(slot) < slot_count && position >= 0 && index < slot_pages;
    return known ? static_cast<uint32_t>(table[slot * slot_pages + index]) : page_count;
  }
  // The key positions that a query sees: from `first_key` up to `end_key`.
  int64_t first_key(int64_t position) const { return position < window ? 0 : position - window + 1; }
  int64_t end_key(int64_t position) const {
    const int64_t kept = slot_pages * page_size;
    return position < kept ? position + 1 : kept;
  }
};

// Tokens of one slot at positions that follow each other; they attend together.
struct Run {
  size_t token, count;
  int32_t slot;
  int64_t position;
};

// A run's queries of one head, and the blocks that they attend to.
struct Work {
  Run run;
  size_t head;
  size_t first_block, end_block;
  float* parts;  // takes the part of each block, to be merged later; or null: they are merged and finished at once

  size_t blocks() const { return end_block - first_block; }
};

// The part that is compiled for each instruction set.
struct AttentionKernels {
  // Puts a token's keys and values into their page.
  void (*write)(const AttentionArgs&, size_t token);
  size_t (*scratch)(const AttentionArgs&);  // bytes that `attend` needs
  void (*attend)(const AttentionArgs&, const Work&, void* scratch);
  // Merges the parts of `work`'s blocks and writes the result.
  void (*finish)(const AttentionArgs&, const Work& work, void* scratch);
};

constexpr size_t kRunRows = 96;  // most queries of a head that attend together, unless one token has more

// Floats of what a block gives one query: the weighted sum of values, 16 sums of weights, the largest score.
inline size_t part_size(const AttentionArgs& args) { return args.width + 2 * kGroup; }

}  // namespace jaxopt
