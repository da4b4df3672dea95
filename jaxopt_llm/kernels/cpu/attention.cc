// The XLA call `jaxopt_attention`: writes new keys and values into their pages, then shares the work of attending.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace jaxopt {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kWriteAlone = 1 << 14;   // values that are not worth a second thread
constexpr size_t kAttendAlone = 1 << 15;  // multiplications likewise
constexpr size_t kLeastBlocks = 2;        // that are worth a chunk of their own
constexpr size_t kChunksPerThread = 4;
constexpr size_t kSplitRows = kRunRows / 4;  // most queries whose blocks are shared out

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

void write(const AttentionKernels& kernels, const AttentionArgs& args) {
  const auto token = [&](size_t index) { kernels.write(args, index); };
  // Neighbours share cache lines of a page and stay on one thread.
  if (args.tokens * args.heads * args.width > kWriteAlone) {
    return parallel_for(ceil_div(args.tokens, kGroup), [&](size_t chunk) {
      const size_t end = std::min(args.tokens, (chunk + 1) * kGroup);
      for (size_t index = chunk * kGroup; index < end; ++index) token(index);
    });
  }
  for (size_t index = 0; index < args.tokens; ++index) token(index);
}

// Runs of at most `most` tokens. Padding belongs to none and gets zeros.
std::vector<Run> find_runs(const AttentionArgs& args, size_t most) {
  std::vector<Run> runs;
  const size_t row_bytes = args.query_heads * args.width * (args.q.type == FloatType::kF32 ? 4 : 2);
  for (size_t token = 0; token < args.tokens; ++token) {
    const int32_t slot = args.slots[token], position = args.positions[token];
    if (slot < 0 || static_cast<size_t>(slot) >= args.slot_count || position < 0) {
      std::memset(static_cast<char*>(args.out) + token * row_bytes, 0, row_bytes);
      continue;
    }
    if (!runs.empty()) {
      Run& last = runs.back();
      const bool follows = last.token + last.count == token && last.slot == slot &&
                           last.position + static_cast<int64_t>(last.count) == position;
      if (follows && last.count < most) {
        ++last.count;
        continue;
      }
    }
    runs.push_back({token, 1, slot, position});
  }
  return runs;
}

Work whole(const AttentionArgs& args, const Run& run, size_t head) {
  const int64_t last = run.position + static_cast<int64_t>(run.count) - 1;
  const size_t first_key = args.first_key(run.position), end_key = args.end_key(last);
  const size_t first = first_key / kKeys;
  return {run, head, first, first_key < end_key ? ceil_div(end_key, kKeys) : first, nullptr};
}

// Later runs of a prompt see more keys: the longest work comes first.
std::vector<Work> all_work(const AttentionArgs& args) {
  const std::vector<Run> runs = find_runs(args, std::max<size_t>(1, kRunRows / args.queries_per_head()));
  std::vector<Work> works;
  works.reserve(runs.size() * args.heads);
  for (auto run = runs.rbegin(); run != runs.rend(); ++run) {
    for (size_t head = 0; head < args.heads; ++head) works.push_back(whole(args, *run, head));
  }
  return works;
}

// The same work as threads take it. Where there is little of it, as when one slot decodes, the blocks of short runs are
// shared out too, and what they give is merged when all are done.
struct Plan {
  std::vector<Work> chunks, merges;
};

Plan share_out(const AttentionArgs& args, const std::vector<Work>& works, size_t threads, Scratch& memory) {
  size_t blocks = 0;
  for (const Work& work : works) blocks += work.blocks();
  const size_t chunk = threads == 1 ? blocks : std::max(kLeastBlocks, ceil_div(blocks, kChunksPerThread * threads));
  const auto rows = [&](const Work& work) { return work.run.count * args.queries_per_head(); };
  const auto is_split = [&](const Work& work) { return work.blocks() > chunk && rows(work) <= kSplitRows; };

  size_t floats = 0;
  for (const Work& work : works) floats += is_split(work) ? work.blocks() * rows(work) * part_size(args) : 0;
  float* parts = reinterpret_cast<float*>(memory.reserve(floats * sizeof(float)));
  Plan plan;
  for (const Work& work : works) {
    if (!is_split(work)) {
      plan.chunks.push_back(work);
      continue;
    }
    plan.merges.push_back({work.run, work.head, work.first_block, work.end_block, parts});
    for (size_t first = work.first_block; first < work.end_block; first += chunk) {
      plan.chunks.push_back({work.run, work.head, first, std::min(first + chunk, work.end_block), parts});
      parts += plan.chunks.back().blocks() * rows(work) * part_size(args);
    }
  }
  return plan;
}

void attend(const AttentionKernels& kernels, const AttentionArgs& args) {
  const auto scratch = [&] {
    thread_local Scratch memory;
    return memory.reserve(kernels.scratch(args));
  };
  const std::vector<Work> works = all_work(args);
  size_t products = 0;
  for (const Work& work : works) products += work.blocks() * kKeys * work.run.count * args.queries_per_head() * args.width;
  if (products <= kAttendAlone) {
    for (const Work& work : works) kernels.attend(args, work, scratch());
    return;
  }
  thread_local Scratch part_memory;
  const Plan plan = share_out(args, works, num_threads(), part_memory);
  parallel_for(plan.chunks.size(), [&](size_t index) { kernels.attend(args, plan.chunks[index], scratch()); });
  parallel_for(plan.merges.size(), [&](size_t index) { kernels.finish(args, plan.merges[index], scratch()); });
}

Floats floats(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::BF16 ? FloatType::kBF16 : FloatType::kF32};
}

PageType page_type(const ffi::AnyBuffer& pages) {
  switch (pages.element_type()) {
    case ffi::S8: return PageType::kI8;
    case ffi::BF16: return PageType::kBF16;
    default: return PageType::kF32;
  }
}

// Pages and scales come in as arguments and go out as results in the same memory. Empty buffers stand for what there is
// not. Shapes and types are checked where the call is made, in Python.
ffi::Error attention(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> positions,
                     ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::F32> sinks,
                     ffi::AnyBuffer, ffi::AnyBuffer, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> key_pages,
                     ffi::Result<ffi::AnyBuffer> value_pages, ffi::ResultBuffer<ffi::F32> key_scales,
                     ffi::ResultBuffer<ffi::F32> value_scales, float scale, float softcap, int64_t window) try {
  AttentionArgs args{};
  args.q = floats(q);
  args.k = floats(k);
  args.v = floats(v);
  args.tokens = q.dimensions()[0];
  args.query_heads = q.dimensions()[1];
  args.heads = k.dimensions()[1];
  args.width = q.dimensions()[2];
  args.positions = positions.typed_data();
  args.slots = slots.typed_data();
  args.table = table.typed_data();
  args.slot_count = table.dimensions()[0];
  args.slot_pages = table.dimensions()[1];
  args.type = page_type(*key_pages);
  args.key_pages = key_pages->untyped_data();
  args.value_pages = value_pages->untyped_data();
  args.key_scales = key_scales->typed_data();
  args.value_scales = value_scales->typed_data();
  args.page_count = value_pages->dimensions()[0];
  args.page_size = value_pages->dimensions()[2];
  args.sinks = sinks.element_count() == 0 ? nullptr : sinks.typed_data();
  args.scale = scale;
  args.softcap = softcap;
  args.window = window;
  args.out = out->untyped_data();

  const AttentionKernels& kernels = jaxopt::kernels().attention;
  write(kernels, args);
  attend(kernels, args);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the scores of an attention layer");
}

}  // namespace
}  // namespace jaxopt

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxopt_attention, jaxopt::attention,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()               // q [tokens, query heads, width]
                                  .Arg<xla::ffi::AnyBuffer>()               // k [tokens, heads, width]
                                  .Arg<xla::ffi::AnyBuffer>()               // v
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // positions [tokens]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // slots [tokens]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // page table [slots, pages]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // sinks [query heads]
                                  .Arg<xla::ffi::AnyBuffer>()               // keys [pages, heads, size / 16, width, 16]
                                  .Arg<xla::ffi::AnyBuffer>()               // values [pages, heads, size, width]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // scales of keys [pages, heads, size]
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // scales of values
                                  .Ret<xla::ffi::AnyBuffer>()               // out, as q
                                  .Ret<xla::ffi::AnyBuffer>()               // keys
                                  .Ret<xla::ffi::AnyBuffer>()               // values
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()   // scales of keys
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()   // scales of values
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"));
