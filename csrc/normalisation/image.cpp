// The normalisation of one image, compiled once per instruction set: MIM4DD_ISA names the namespace.
//
// With m the mean and r the inverse deviation of a channel, n = (x - m) r, a = w n + b, out = pool(relu(a)), and
// P(g) = g - mean(g) - n mean(g n), which is its own transpose:
//   backward: d = relu'(a) pool'(grad_out);  grad_x = w r P(d);  grad_weight = sum(d n);  grad_bias = sum(d).
//   twice:    of <u, grad_x> + <v, grad_weight> + <s, grad_bias>, with u = grad_grad_x, v = grad_grad_weight,
//             s = grad_grad_bias, S = sum(u P(d)), A = sum(d n), B = sum(u n):
//             grad_d = w r P(u) + v n + s;  grad_grad_out = pool(relu'(a) grad_d);  grad_weight = r S;
//             grad_x = r P(c) - w r^2 S n / N,  c = v d - (w r / N)(A u + B d).
// What one worker reads of an image stays in the cache between its sweeps. No standard templates here: the linker
// would keep one copy of each for all instruction sets.
#include "normalisation.h"
#include "../vec.h"

namespace mim4dd::MIM4DD_ISA {
namespace {

// `count` channels of one image, from channel `first` on. What the sweeps use is copied into local variables: the
// compiler must assume that a store may change a member, but not a local variable.
template <typename T, typename Acc, int Groups>
class Worker {
  using V = Vec<Acc, Groups>;

  // These channels at every pixel of a map.
  template <typename U>
  struct Map {
    U* data;
    int64_t stride;
    int count;

    V operator[](int64_t pixel) const { return V::read(data + pixel * stride, count); }
    void set(int64_t pixel, const V& value) const { value.write(data + pixel * stride, count); }
  };

 public:
  Worker(const NormCall& call, int64_t image, int64_t first, int count)
      : call_(call), image_(image), first_(first), count_(count) {}

  void run() const {
    switch (call_.pass) {
      case NormCall::kForward: return forward();
      case NormCall::kBackward: return backward();
      case NormCall::kBackwardTwice: return backward_twice();
    }
  }

 private:
  const NormCall& call_;
  const int64_t image_, first_;
  const int count_;

  int64_t pixels() const { return call_.height * call_.width; }
  int64_t cells() const { return (call_.height / call_.pool) * (call_.width / call_.pool); }
  V one_nth() const { return V(Acc(1) / static_cast<Acc>(pixels())); }
  V share() const { return V(Acc(1) / static_cast<Acc>(call_.pool * call_.pool)); }

  Map<const T> map(const void* data, int64_t size) const {
    return {static_cast<const T*>(data) + image_ * size * call_.channels + first_, call_.channels, count_};
  }
  Map<T> map(void* data, int64_t size) const {
    return {static_cast<T*>(data) + image_ * size * call_.channels + first_, call_.channels, count_};
  }
  V per_channel(const void* data) const { return V::read(static_cast<const Acc*>(data) + first_, count_); }
  V per_image(const void* data) const { return V::read(statistics(data), count_); }
  void set_per_image(void* data, const V& value) const { value.write(const_cast<Acc*>(statistics(data)), count_); }
  const Acc* statistics(const void* data) const {
    return static_cast<const Acc*>(data) + image_ * call_.channels + first_;
  }

  // The mean over pixels of value(pixel): row by row, so that a float does not lose digits over a large image.
  template <typename Value>
  V mean_of(const Value& value) const {
    const int64_t height = call_.height, width = call_.width;
    V total(0);
    for (int64_t y = 0; y < height; ++y) {
      V row(0);
      for (int64_t x = 0; x < width; ++x) row += value(y * width + x);
      total += row;
    }
    return total * one_nth();
  }

  // Calls visit(cell, pixels, n) with the pixels of every pooling window; cell is -1 where a window is cut off.
  template <typename Visit>
  void each_window(const Visit& visit) const {
    const int64_t pool = call_.pool, height = call_.height, width = call_.width;
    int64_t cell = 0;
    for (int64_t top = 0; top < height; top += pool)
      for (int64_t left = 0; left < width; left += pool) {
        int64_t pixels[4];
        int n = 0;
        for (int64_t y = top; y < top + pool && y < height; ++y)
          for (int64_t x = left; x < left + pool && x < width; ++x) pixels[n++] = y * width + x;
        const bool whole = n == pool * pool;
        visit(whole ? cell : -1, pixels, n);
        cell += whole;
      }
  }

  void forward() const {
    const Map<const T> x = map(call_.x, pixels());
    const Map<T> out = map(call_.out, cells());
    const V mean = mean_of([=](int64_t pixel) { return x[pixel]; });
    const V variance = mean_of([=](int64_t pixel) {
      const V centred = x[pixel] - mean;
      return centred * centred;
    });
    const V rstd = (variance + V(static_cast<Acc>(call_.eps))).inverse_root();
    set_per_image(call_.mean, mean);
    set_per_image(call_.rstd, rstd);
    const V scale = per_channel(call_.weight) * rstd, bias = per_channel(call_.bias), share = this->share();
    const bool relu = call_.relu;
    each_window([=](int64_t cell, const int64_t* pixels, int n) {
      if (cell < 0) return;
      V sum(0);
      for (int i = 0; i < n; ++i) {
        const V a = (x[pixels[i]] - mean) * scale + bias;
        sum += relu ? a.keep_unless_negative(a) : a;
      }
      out.set(cell, sum * share);
    });
  }

  // Calls visit(cell, pixel, x - m, a, d) for every pixel.
  template <typename Visit>
  void each_pixel(const Visit& visit) const {
    const Map<const T> x = map(call_.x, pixels()), grad_out = map(call_.grad_out, cells());
    const V mean = per_image(call_.mean), scale = per_channel(call_.weight) * per_image(call_.rstd);
    const V bias = per_channel(call_.bias), share = this->share();
    const bool relu = call_.relu;
    each_window([&](int64_t cell, const int64_t* pixels, int n) {
      const V grad = cell < 0 ? V(0) : grad_out[cell] * share;
      for (int i = 0; i < n; ++i) {
        const V centred = x[pixels[i]] - mean, a = centred * scale + bias;
        visit(cell, pixels[i], centred, a, relu ? grad.keep_unless_negative(a) : grad);
      }
    });
  }

  void backward() const {
    V sum_d(0), sum_dc(0);
    each_pixel([&](int64_t, int64_t, const V& centred, const V&, const V& d) {
      sum_d += d;
      sum_dc += d * centred;
    });
    const V rstd = per_image(call_.rstd), scale = per_channel(call_.weight) * rstd;
    set_per_image(call_.grad_weight, sum_dc * rstd);
    set_per_image(call_.grad_bias, sum_d);
    const V offset = scale * sum_d * one_nth(), slope = scale * sum_dc * rstd * rstd * one_nth();
    const Map<T> grad_x = map(call_.grad_x, pixels());
    each_pixel([=](int64_t, int64_t pixel, const V& centred, const V&, const V& d) {
      grad_x.set(pixel, scale * d - offset - centred * slope);
    });
  }

  void backward_twice() const {
    const Map<const T> grad_grad_x = map(call_.grad_grad_x, pixels());
    V sum_d(0), sum_dc(0), sum_u(0), sum_uc(0), sum_ud(0);
    each_pixel([&](int64_t, int64_t pixel, const V& centred, const V&, const V& d) {
      const V u = grad_grad_x[pixel];
      sum_d += d;
      sum_dc += d * centred;
      sum_u += u;
      sum_uc += u * centred;
      sum_ud += u * d;
    });
    const V rstd = per_image(call_.rstd), scale = per_channel(call_.weight) * rstd, one_nth = this->one_nth();
    const V v = per_image(call_.grad_grad_weight), s = per_image(call_.grad_grad_bias);
    const V dn = sum_dc * rstd, un = sum_uc * rstd;                  // A and B
    const V product = sum_ud - (sum_u * sum_d + dn * un) * one_nth;  // S
    set_per_image(call_.grad_weight, rstd * product);
    // c = along_u u + along_d d
    const V along_u = V(0) - scale * one_nth * dn, along_d = v - scale * one_nth * un;
    const V mean_c = (along_u * sum_u + along_d * sum_d) * one_nth;
    const V mean_cn = (along_u * un + along_d * dn) * one_nth;
    const V mean_u = sum_u * one_nth, mean_un = un * one_nth;
    const V direct = scale * rstd * product * one_nth, share = this->share();
    const Map<T> grad_x = map(call_.grad_x, pixels()), grad_grad_out = map(call_.grad_grad_out, cells());
    const bool relu = call_.relu;
    int64_t open = -1;
    V sum(0);
    each_pixel([&](int64_t cell, int64_t pixel, const V& centred, const V& a, const V& d) {
      const V u = grad_grad_x[pixel], normal = centred * rstd;
      grad_x.set(pixel, rstd * (along_u * u + along_d * d - mean_c - normal * mean_cn) - direct * normal);
      if (cell < 0) return;
      if (cell != open) sum = V(0);
      open = cell;
      const V grad_d = scale * (u - mean_u - normal * mean_un) + v * normal + s;
      sum += relu ? grad_d.keep_unless_negative(a) : grad_d;
      grad_grad_out.set(cell, sum * share);
    });
  }
};

template <typename T, typename Acc>
void run(const NormCall& call, int64_t image) {
  constexpr int lanes = Lanes<Acc>::count;
  int64_t first = 0;
  for (; first + 4 * lanes <= call.channels; first += 4 * lanes)
    Worker<T, Acc, 4>(call, image, first, lanes).run();
  for (; first < call.channels; first += lanes) {
    const int64_t left = call.channels - first;
    Worker<T, Acc, 1>(call, image, first, left < lanes ? static_cast<int>(left) : lanes).run();
  }
}

}  // namespace

void norm_image(const NormCall& call, int64_t image) {
  switch (call.type) {
    case NormCall::kFloat: return run<float, float>(call, image);
    case NormCall::kDouble: return run<double, double>(call, image);
    case NormCall::kBFloat16: return run<BFloat16, float>(call, image);
  }
}

}  // namespace mim4dd::MIM4DD_ISA
