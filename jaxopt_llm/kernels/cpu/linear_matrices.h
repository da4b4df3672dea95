// The product of whole stripes of digits on a unit that multiplies matrices. A row has the bits that `linear_kernel.h`
// gives it: sums of integers are exact, and floats follow in its order.
#pragma once

#include "floats.h"
#include "linear_results.h"

namespace {

using jaxopt::kBase;
using jaxopt::kDigitsOfFloat;
using jaxopt::kMostPanels;
using jaxopt::Tiles;

constexpr size_t kBlock = jaxopt::kRounded;
constexpr size_t kStripe = amx::kRows;

// Signed bytes of panels.
inline void unpack(const LinearArgs& args, const uint8_t* codes, size_t panels, uint8_t* bytes) {
  const size_t vectors = panels * kLanes * args.inputs * args.bits / 8 / 64;
  for (size_t i = 0; i < vectors; ++i) {
    const simd::Codes loaded = simd::load_codes(codes + 64 * i);
    if (args.bits == 8) {
      simd::store_codes(bytes + 64 * i, simd::without(simd::nibbles(loaded), simd::kByteZero));
    } else {
      simd::store_codes(bytes + 128 * i, simd::without(simd::low_nibbles(loaded), args.nibble_zero()));
      simd::store_codes(bytes + 128 * i + 64, simd::without(simd::high_nibbles(loaded), args.nibble_zero()));
    }
  }
}

// Stripes by panels, whose codes are signed bytes.
struct Area {
  size_t first_stripe, last_stripe;
  const uint8_t* codes;
  size_t first_panel, panels;
};

// Integer sums of an area, run after run, panel after panel, stripe after stripe. The next run is begun before a run
// becomes floats: the unit works beside the vectors.
class Runs {
 public:
  Runs(const LinearArgs& args, const Tiles& tiles, const Area& area)
      : x_(reinterpret_cast<const int8_t*>(tiles.x) + area.first_stripe * kStripe * args.inputs * kDigitsOfFloat),
        codes_(area.codes),
        inputs_(args.inputs),
        per_scale_(args.blocks_per_scale()),
        most_(args.blocks_per_run()),
        panels_(area.panels),
        tiles_left_((area.last_stripe - area.first_stripe) * area.panels) {
    begin(sums_[0]);
  }

  using Sums = int32_t[kDigitsOfFloat][kStripe][kLanes];

  JAXOPT_INLINE const Sums& next() {
    const Sums& ready = sums_[begun_ % 2 == 0];
    begin(sums_[begun_ % 2]);
    return ready;
  }

 private:
  // Registers: sums of each digit, digits, weights.
  template <int kDigit>
  static constexpr int kLeft = kDigitsOfFloat + kDigit;
  static constexpr int kRight = 2 * kDigitsOfFloat;

  void begin(Sums& sums) {
    ++begun_;
    if (tiles_left_ == 0) return;
    const size_t left = per_scale_ - done_ % per_scale_, blocks = left < most_ ? left : most_;
    each_digit([](auto digit) { amx::clear<digit.k>(); });
    for (size_t b = 0; b < blocks; ++b) {
      amx::load<kRight>(codes_, amx::kRowBytes);
      each_digit([this](auto digit) {
        amx::load<kLeft<digit.k>>(x_ + digit.k * kBlock, kDigitsOfFloat * kBlock);
        amx::multiply<digit.k, kLeft<digit.k>, kRight>();
      });
      x_ += kStripe * kDigitsOfFloat * kBlock;
      codes_ += kBlock * kLanes;
    }
    each_digit([&sums](auto digit) { amx::store<digit.k>(sums[digit.k], amx::kRowBytes); });
    done_ += blocks;
    if (done_ * kBlock == inputs_) end_tile();
  }

  // Activations begin again for the next panel, weights for the next stripe.
  void end_tile() {
    done_ = 0;
    if (--tiles_left_ % panels_ != 0) {
      x_ -= kStripe * kDigitsOfFloat * inputs_;
    } else {
      codes_ -= panels_ * kLanes * inputs_;
    }
  }

  template <int kDigit>
  struct Digit {
    static constexpr int k = kDigit;
  };
  template <class Use>
  static JAXOPT_INLINE void each_digit(Use use) {
    static_assert(kDigitsOfFloat == 3);
    use(Digit<0>());
    use(Digit<1>());
    use(Digit<2>());
  }

  const int8_t* x_;
  const uint8_t* codes_;
  size_t inputs_;
  size_t per_scale_, most_, done_ = 0;  // blocks: under a scale, in a run, of the tile
  size_t panels_, tiles_left_;
  size_t begun_ = 0;  // runs
  alignas(64) Sums sums_[2];
};

JAXOPT_INLINE F32 value(const Runs::Sums& sums, size_t row) {
  F32 result = simd::to_float(simd::load(sums[0][row]));
  JAXOPT_UNROLL
  for (size_t d = 1; d < kDigitsOfFloat; ++d) {
    result = simd::fma(result, simd::broadcast(kBase), simd::to_float(simd::load(sums[d][row])));
  }
  return result;
}

// The sums of a stripe with a panel.
template <bool kMinimum>
void multiply_tile(const LinearArgs& args, const Tiles& tiles, Runs& runs, size_t panel, size_t base, Sums& out) {
  const float *x_scale = tiles.scale + base * args.blocks(), *x_sum = tiles.sum + base * args.blocks();
  F32 total[kStripe];
  JAXOPT_UNROLL
  for (F32& row : total) row = simd::zero();
  const size_t per_scale = args.blocks_per_scale(), most = args.blocks_per_run();
  for (size_t s = 0; s < args.scales; ++s) {
    const F32 scale = load_floats(args.scale, panel * args.scales + s);
    const F32 minimum = kMinimum ? load_floats(args.minimum, panel * args.scales + s) : simd::zero();
    for (size_t b = 0; b < per_scale; b += most) {
      const Runs::Sums& sums = runs.next();
      JAXOPT_UNROLL
      for (size_t r = 0; r < kStripe; ++r) {
        total[r] = simd::fma(value(sums, r), simd::mul(scale, simd::broadcast(x_scale[r])), total[r]);
        if (kMinimum) total[r] = simd::fma(minimum, simd::broadcast(x_sum[r]), total[r]);
      }
      x_scale += kStripe;
      x_sum += kStripe;
    }
  }
  JAXOPT_UNROLL
  for (size_t r = 0; r < kStripe; ++r) simd::store(out[r], total[r]);
}

void multiply_area(const LinearArgs& args, const Tiles& tiles, const Area& area) {
  const auto tile = args.minimum.data == nullptr ? multiply_tile<false> : multiply_tile<true>;
  const size_t per_group = args.panels_per_group();
  Runs runs(args, tiles, area);
  Sums sums[kMostPanels];
  for (size_t stripe = area.first_stripe; stripe < area.last_stripe; ++stripe) {
    const size_t base = stripe * kStripe;
    for (size_t p = 0; p < area.panels; ++p) tile(args, tiles, runs, area.first_panel + p, base, sums[p]);
    finish_tile(args, area.first_panel / per_group, area.panels / per_group, base, kStripe, sums);
  }
}

void multiply_stripes(const LinearArgs& args, const Tiles& tiles, size_t first_group, size_t last_group,
                      size_t first_stripe, size_t last_stripe, uint8_t* bytes) {
  const amx::Shapes shapes(kDigitsOfFloat, kBlock);
  const size_t end = last_group * args.panels_per_group();
  for (size_t panel = first_group * args.panels_per_group(); panel < end; panel += kMostPanels) {
    const size_t panels = end - panel < kMostPanels ? end - panel : kMostPanels;
    unpack(args, args.codes + panel * kLanes * args.inputs * args.bits / 8, panels, bytes);
    multiply_area(args, tiles, {first_stripe, last_stripe, bytes, panel, panels});
  }
}

}  // namespace
