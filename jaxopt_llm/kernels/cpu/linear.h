// The product of activations with packed weights: what its parts tell each other.
//
// Weights come in panels of 16 outputs, so that a vector holds one value of each output and no sum runs across lanes.
// Within a panel: `[vector][16 outputs][4 inputs]`. Bytes are codes + 128. A byte of nibbles holds the codes of inputs
// 8k + j (low) and 8k + 4 + j (high), of 2 vectors' worth in 1.
//
// A block is inputs that never lie under two scales: 32, or 16 where the weights' groups are no multiple of 32. Rows of
// activations come in tiles of a few rows: `[block][row][inputs of the block]`. Where activations are not rounded, an
// instruction set with fast integer dots has three of those to a row, the digits of its fixed-point numbers. They keep 23
// bits below the largest of up to 512 inputs: beside one that is 1e5 times larger, others have six or seven.
//
// A row's arithmetic is the same in a tile of any height, and no sum is split, so its bits depend on nothing beside it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jaxopt {

constexpr size_t kLanes = 16;      // outputs of a panel
constexpr size_t kRounded = 32;  // inputs that share one scale of rounded activations
constexpr size_t kMostPanels = 2;  // that are multiplied together
constexpr size_t kLongestRun = 512;  // inputs whose digits share a scale
constexpr size_t kMostRows = 16;   // of a tile

enum class FloatType { kF32, kF16, kBF16 };
enum class Gate { kNone, kSilu, kGelu, kGeluTanh };

struct Floats {
  const void* data;
  FloatType type;
};

struct LinearArgs {
  const float* x;  // [rows, inputs]
  size_t rows, inputs;
  size_t block;   // inputs: `kRounded` or half of it
  size_t stripe;  // rows that are handed out together

  const float* gain;  // [inputs] of an RMS norm, or null
  float eps;

  const uint8_t* codes;
  Floats scale;    // [panels, scales, 16]
  Floats minimum;  // as scale; data null where codes are symmetric
  size_t panels, scales;
  int bits;               // 8 or 4
  bool round;             // activations to 8 bits
  size_t x_bytes;         // of an activation in its tile

  const float* bias;  // [panels, 16] or null
  Gate gate;          // with one, panels alternate between gate and up
  float* y;           // [rows, outputs]
  size_t outputs;

  size_t blocks() const { return inputs / block; }
  size_t blocks_per_scale() const { return blocks() / scales; }
  // Blocks of a run of digits: those under one scale of the weights, in as few runs of about the same length as may be.
  size_t blocks_per_run() const {
    const size_t blocks = blocks_per_scale(), runs = (blocks * block + kLongestRun - 1) / kLongestRun;
    return (blocks + runs - 1) / runs;
  }
  size_t panels_per_group() const { return gate == Gate::kNone ? 1 : 2; }
  // What is added to a code to store it: nibbles beside a minimum are stored as they are.
  int32_t nibble_zero() const { return minimum.data == nullptr ? 8 : 0; }
};

constexpr size_t kDigitsOfFloat = 3;
constexpr float kBase = 254;  // of digits within 127 on either side

// Activations ready for the product, tile after tile; a tile starts at its first row's place. A run is the blocks whose
// products are summed before a scale takes part: one block, or with digits up to 512 inputs under one scale of the weights.
struct Tiles {
  char* x;         // [rows * inputs]
  float* scale;    // [rows * runs]
  float* sum;      // [rows * runs] of the values that the product sees
  int32_t* start;  // [rows * runs * digits]: where the integer sum starts, to end without the codes' offsets
};

// The part that is compiled for each instruction set. Rows are handed out in stripes of so many (the last may have
// fewer), weights in groups of panels that give 16 results. `unpacked` has room for the bytes of `kMostPanels` panels.
struct LinearKernels {
  size_t (*stripe)(const LinearArgs&);  // `args.stripe`
  size_t float_bytes;                   // `x_bytes` where activations are not rounded
  void (*prepare)(const LinearArgs&, const Tiles&, size_t stripe);
  void (*multiply)(const LinearArgs&, const Tiles&, size_t first_group, size_t last_group, size_t first_stripe,
                   size_t last_stripe, uint8_t* unpacked);
};

}  // namespace jaxopt
