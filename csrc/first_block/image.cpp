// A block's passes over one image, compiled once per instruction set: MIM4DD_ISA names the namespace.
//
// With c = conv(x, w) and y = norm(c), norm's passes being those of normalisation/image.cpp:
//   backward: d = norm'(grad_y);  grad_x = conv'(d, w), the transpose in x;  grad_w = corr(d, x), that in w.
//   twice:    with p = grad_grad_x and q = grad_grad_w, <p, grad_x> + <q, grad_w> is <d, u>, where
//             u = conv(p, w) + conv(x, q): the second pass of the normalisation, with grad_grad_c = u, gives
//             grad_grad_y and e = grad_c;  grad_x = conv'(e, w) + conv'(d, q);  grad_w = corr(e, x) + corr(d, p).
// No standard templates here: the linker would keep one copy for all instruction sets.
#include "first_block.h"
#include "../lanes.h"
#include "../normalisation/normalisation.h"
#include "../vec.h"

namespace mim4dd::MIM4DD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTapRows = 9;
#else
constexpr int kTapRows = 3;  // fewer registers
#endif

class Image {
 public:
  Image(const BlockCall& call, int64_t image, float* scratch)
      : call_(call), image_(image), wide_(call.width + 2 * call.padding), high_(call.height + 2 * call.padding) {
    const auto take = [&](int64_t numbers) {
      float* start = scratch;
      scratch += numbers;
      return start;
    };
    x_ = take(padded(call)), grad_grad_x_ = take(padded(call)), grad_x_ = take(padded(call));
    grad_patches_ = take(pixels(call) * kTurnedRow);
    c_ = take(pixels(call) * call.group), d_ = take(pixels(call) * call.group);
    u_ = take(pixels(call) * call.group), e_ = take(pixels(call) * call.group);
    in_cells_ = take(cells(call) * call.group), out_cells_ = take(cells(call) * call.group);
    weights_ = take(2 * kMostTaps * call.group);
    for (int64_t tap = 0; tap < call.taps; ++tap) {
      offset_[tap] = (tap / 9 * high_ + tap / 3 % 3) * wide_ + tap % 3;
      offset_[call.taps + tap] = offset_[tap] + (grad_grad_x_ - x_);
    }
  }

  void run() {
    pad(call_.x, x_);
    if (call_.grad_grad_x) pad(call_.grad_grad_x, grad_grad_x_);
    for (first_ = 0; first_ < call_.out; first_ += call_.group) {
      convolve(c_, call_.weight, nullptr);
      NormCall norm = this->norm();
      if (call_.pass == BlockCall::kForward) {
        norm.pass = NormCall::kForward, norm.out = out_cells_;
        norm_image(norm, 0);
        scatter_cells(call_.y);
        continue;
      }
      gather_cells(call_.grad_y);
      norm.pass = NormCall::kBackward, norm.grad_out = in_cells_, norm.grad_x = d_;
      float unused[2][kMostGroup];
      const bool twice = call_.pass == BlockCall::kBackwardTwice;
      norm.grad_weight = twice ? unused[0] : per_image(call_.grad_scale);
      norm.grad_bias = twice ? unused[1] : per_image(call_.grad_bias);
      norm_image(norm, 0);
      if (!twice) {
        if (call_.grad_x) add_grad_patches(d_, call_.turned, first_ > 0);
        if (call_.grad_weight) add_grad_weight<false>(d_, x_);
        continue;
      }
      convolve(u_, call_.grad_grad_weight, call_.grad_grad_x ? call_.weight : nullptr);
      norm.pass = NormCall::kBackwardTwice, norm.grad_x = e_, norm.grad_grad_out = out_cells_;
      norm.grad_grad_x = u_;
      norm.grad_grad_weight = call_.grad_grad_scale + first_, norm.grad_grad_bias = call_.grad_grad_bias + first_;
      norm.grad_weight = per_image(call_.grad_scale);
      norm_image(norm, 0);
      scatter_cells(call_.grad_grad_y);
      add_grad_patches(e_, call_.turned, first_ > 0);
      add_grad_patches(d_, call_.grad_grad_turned, true);
      add_grad_weight<false>(e_, x_);
      if (call_.grad_grad_x) add_grad_weight<true>(d_, grad_grad_x_);
    }
    if (call_.pass != BlockCall::kForward && call_.grad_x) sum_taps();
  }

 private:
  static constexpr int kMostGroup = 64;
  const BlockCall& call_;
  const int64_t image_, wide_, high_;
  int64_t first_ = 0;                  // channel of the group
  int64_t offset_[2 * kMostTaps];      // of a tap in the padded image
  float *x_, *grad_grad_x_, *grad_x_;  // padded images
  float* grad_patches_;                // [pixels, kTurnedRow], the gradient of what each tap sees
  float *c_, *d_, *u_, *e_;            // [pixels, group]
  float *in_cells_, *out_cells_;       // [cells, group]
  float* weights_;                     // [taps or twice as many, group]

  float* per_image(float* data) const { return data + image_ * call_.out + first_; }

  NormCall norm() const {
    NormCall norm{};
    norm.type = NormCall::kFloat;
    norm.batch = 1, norm.channels = call_.group, norm.height = call_.down, norm.width = call_.across;
    norm.pool = call_.pool, norm.relu = call_.relu, norm.eps = call_.eps;
    norm.x = c_, norm.weight = call_.scale + first_, norm.bias = call_.bias + first_;
    norm.mean = per_image(call_.mean), norm.rstd = per_image(call_.rstd);
    return norm;
  }

  void pad(const float* from, float* to) const {
    from += image_ * call_.in * call_.height * call_.width;
    for (int64_t i = 0; i < padded(call_); ++i) to[i] = 0;
    for (int64_t plane = 0; plane < call_.in; ++plane)
      for (int64_t y = 0; y < call_.height; ++y)
        for (int64_t x = 0; x < call_.width; ++x)
          to[(plane * high_ + y + call_.padding) * wide_ + x + call_.padding] =
              from[(plane * call_.height + y) * call_.width + x];
  }

  template <typename From, typename To>
  void copy_cells(const From* from, int64_t from_row, To* to, int64_t to_row) const {
    using Numbers = Lanes<float>;
    for (int64_t cell = 0; cell < cells(call_); ++cell)
      for (int64_t channel = 0; channel < call_.group; channel += Numbers::count) {
        Numbers::type numbers;
        load(numbers, from + cell * from_row + channel);
        store(to + cell * to_row + channel, numbers);
      }
  }
  int64_t in_map() const { return image_ * cells(call_) * call_.out + first_; }
  void gather_cells(const void* map) const {
    if (call_.half)
      copy_cells(static_cast<const BFloat16*>(map) + in_map(), call_.out, in_cells_, call_.group);
    else
      copy_cells(static_cast<const float*>(map) + in_map(), call_.out, in_cells_, call_.group);
  }
  void scatter_cells(void* map) const {
    if (call_.half)
      copy_cells(out_cells_, call_.group, static_cast<BFloat16*>(map) + in_map(), call_.out);
    else
      copy_cells(out_cells_, call_.group, static_cast<float*>(map) + in_map(), call_.out);
  }

  // conv(x, weight), plus conv(grad_grad_x, other) where `other` is given.
  void convolve(float* to, const float* weight, const float* other) const {
    const int64_t group = call_.group, across = call_.across, taps = other ? 2 * call_.taps : call_.taps;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const float* from = tap < call_.taps ? weight + tap * call_.out : other + (tap - call_.taps) * call_.out;
      __builtin_memcpy(weights_ + tap * group, from + first_, group * sizeof(float));
    }
    const int64_t* offset = offset_;
    for (int64_t y = 0; y < call_.down; ++y)
      for (int64_t begin = 0; begin < across; begin += kRows) {
        const int64_t x = begin + kRows > across ? across - kRows : begin;  // repeats some pixels
        const float* from = x_ + y * wide_ + x;
        for (int64_t panel = 0; panel < group; panel += kPanel)
          product<kRows, false>(
              taps, [from, offset](int row, int64_t tap) { return from[offset[tap] + row]; }, weights_ + panel, group,
              to + (y * across + x) * group + panel, group);
      }
  }

  // grad_patches[pixel, tap] (+)= the sum of d weight over the group's channels.
  void add_grad_patches(const float* d, const float* turned, bool add) const {
    const int64_t group = call_.group, all = call_.down * call_.across;
    for (int64_t panel = 0; panel < call_.taps; panel += kPanel)
      for (int64_t pixel = 0; pixel < all; pixel += kRows) {
        const auto a = [from = d + pixel * group, group](int row, int64_t k) { return from[row * group + k]; };
        const float* b = turned + first_ * kTurnedRow + panel;
        float* c = grad_patches_ + pixel * kTurnedRow + panel;
        if (add)
          product<kRows, true>(group, a, b, kTurnedRow, c, kTurnedRow);
        else
          product<kRows, false>(group, a, b, kTurnedRow, c, kTurnedRow);
      }
  }

  void sum_taps() const {
    for (int64_t i = 0; i < padded(call_); ++i) grad_x_[i] = 0;
    for (int64_t tap = 0; tap < call_.taps; ++tap)
      for (int64_t y = 0; y < call_.down; ++y)
        for (int64_t x = 0; x < call_.across; ++x)
          grad_x_[offset_[tap] + y * wide_ + x] += grad_patches_[(y * call_.across + x) * kTurnedRow + tap];
    float* to = call_.grad_x + image_ * call_.in * call_.height * call_.width;
    for (int64_t plane = 0; plane < call_.in; ++plane)
      for (int64_t y = 0; y < call_.height; ++y)
        for (int64_t x = 0; x < call_.width; ++x)
          to[(plane * call_.height + y) * call_.width + x] =
              grad_x_[(plane * high_ + y + call_.padding) * wide_ + x + call_.padding];
  }

  // grad_weight[tap, channel] (+)= the sum over pixels of d times the padded image at the tap.
  template <bool Add>
  void add_grad_weight(const float* d, const float* padded) const {
    const int64_t group = call_.group;
    for (int64_t tap = 0; tap < call_.taps; tap += kTapRows)
      for (int64_t panel = 0; panel < group; panel += kPanel) {
        float* to = call_.grad_weight + (image_ * call_.taps + tap) * call_.out + first_ + panel;
        for (int64_t y = 0; y < call_.down; ++y) {
          const auto a = [from = padded + y * wide_, offset = offset_ + tap](int row, int64_t x) {
            return from[offset[row] + x];
          };
          const float* b = d + y * call_.across * group + panel;
          if (Add || y > 0)
            product<kTapRows, true>(call_.across, a, b, group, to, call_.out);
          else
            product<kTapRows, false>(call_.across, a, b, group, to, call_.out);
        }
      }
  }
};

}  // namespace

void block_image(const BlockCall& call, int64_t image, float* scratch) { Image(call, image, scratch).run(); }

}  // namespace mim4dd::MIM4DD_ISA
