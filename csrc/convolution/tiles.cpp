// Winograd's convolution on ranges of tiles, compiled once per instruction set: MIM4DD_ISA names the namespace.
//
// With the polynomials' points 0, +-sqrt(1/2), +-sqrt(2) and infinity, in one dimension
//   y = A'(G w * B'd):  d 6 numbers in, w the weight's 3, y 4 numbers out,
// and in two the same along rows and columns: 36 products for 16 outputs where the sum takes 144. Sums over channels
// are then 36 matrix products. These points round half as often as the usual 0, +-1, +-2: in float32 the largest error
// is about twice that of the plain sum. grad_x is the same operation with the weight turned round; grad_weight is
// G'((B'd)(A g))G. No standard templates here: the linker would keep one copy for all instruction sets.
#include "convolution.h"
#include "../lanes.h"

namespace mim4dd::MIM4DD_ISA {
namespace {

constexpr float kRoot = 1.41421356237309505f, kHalfRoot = 0.70710678118654752f;

struct InputTransform {  // B'
  static constexpr int kFrom = 6, kTo = 6;
  static void apply(const Lane* d, Lane* v) {
    const Lane even = d[4] - 2.0f * d[2], odd = kHalfRoot * (d[3] - 2.0f * d[1]);
    const Lane even2 = d[4] - 0.5f * d[2], odd2 = kRoot * (d[3] - 0.5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = even2 + odd2;
    v[4] = even2 - odd2;
    v[5] = d[1] - 2.5f * d[3] + d[5];
  }
};

struct WeightTransform {  // G
  static constexpr int kFrom = 3, kTo = 6;
  static void apply(const Lane* w, Lane* u) {
    const Lane even = (-2.0f / 3) * w[0] - (1.0f / 3) * w[2], odd = (-2.0f / 3 * kHalfRoot) * w[1];
    const Lane even2 = (1.0f / 6) * w[0] + (1.0f / 3) * w[2], odd2 = (kRoot / 6) * w[1];
    u[0] = w[0];
    u[1] = even + odd;
    u[2] = even - odd;
    u[3] = even2 + odd2;
    u[4] = even2 - odd2;
    u[5] = w[2];
  }
};

struct OutputTransform {  // A'
  static constexpr int kFrom = 6, kTo = 4;
  static void apply(const Lane* m, Lane* y) {
    const Lane sum = m[1] + m[2], difference = kHalfRoot * (m[1] - m[2]);
    const Lane sum2 = m[3] + m[4], difference2 = kRoot * (m[3] - m[4]);
    y[0] = m[0] + sum + sum2;
    y[1] = difference + difference2;
    y[2] = 0.5f * sum + 2.0f * sum2;
    y[3] = 0.5f * difference + 2.0f * difference2 + m[5];
  }
};

struct OutputTransposed {  // A
  static constexpr int kFrom = 4, kTo = 6;
  static void apply(const Lane* g, Lane* q) {
    const Lane even = g[0] + 0.5f * g[2], odd = kHalfRoot * (g[1] + 0.5f * g[3]);
    const Lane even2 = g[0] + 2.0f * g[2], odd2 = kRoot * (g[1] + 2.0f * g[3]);
    q[0] = g[0];
    q[1] = even + odd;
    q[2] = even - odd;
    q[3] = even2 + odd2;
    q[4] = even2 - odd2;
    q[5] = g[3];
  }
};

struct WeightTransposed {  // G'
  static constexpr int kFrom = 6, kTo = 3;
  static void apply(const Lane* u, Lane* w) {
    const Lane sum = u[1] + u[2], sum2 = u[3] + u[4];
    w[0] = u[0] - (2.0f / 3) * sum + (1.0f / 6) * sum2;
    w[1] = (kRoot / 6) * (u[3] - u[4]) - (2.0f / 3 * kHalfRoot) * (u[1] - u[2]);
    w[2] = (1.0f / 3) * (sum2 - sum) + u[5];
  }
};

// Along columns, then along rows: reads read(row, column) and calls write(row, column, value).
template <typename Transform, typename Read, typename Write>
inline __attribute__((always_inline)) void both_ways(const Read& read, const Write& write) {
  constexpr int from = Transform::kFrom, to = Transform::kTo;
  Lane half[from][to];
  for (int column = 0; column < from; ++column) {
    Lane line[from];
    for (int row = 0; row < from; ++row) line[row] = read(row, column);
    Transform::apply(line, half[column]);
  }
  for (int row = 0; row < to; ++row) {
    Lane line[from], result[to];
    for (int column = 0; column < from; ++column) line[column] = half[column][row];
    Transform::apply(line, result);
    for (int column = 0; column < to; ++column) write(row, column, result[column]);
  }
}

// Where the `Side` x `Side` numbers of a tile are in a map, from `offset` rows and columns before it; null: outside.
template <int Side, typename T>
struct Places {
  T* at[Side][Side];

  Places(const ConvCall& call, T* map, int64_t channels, int64_t tile, int64_t offset) {
    const int64_t image = tile / (call.tiles_down * call.tiles_across), place = tile % (call.tiles_down * call.tiles_across);
    const int64_t top = place / call.tiles_across * 4 - offset, left = place % call.tiles_across * 4 - offset;
    for (int64_t row = 0; row < Side; ++row)
      for (int64_t column = 0; column < Side; ++column) {
        const int64_t y = top + row, x = left + column;
        const bool inside = y >= 0 && y < call.height && x >= 0 && x < call.width;
        at[row][column] = inside ? map + ((image * call.height + y) * call.width + x) * channels : nullptr;
      }
  }
};

// Transforms a tile; its numbers of point p and channel c go to write(c) + p * stride.
template <typename Transform, typename Write>
inline void transform_tile(const ConvCall& call, const float* map, int64_t channels, int64_t tile, int64_t stride,
                           const Write& write) {
  constexpr int side = Transform::kFrom;
  const Places<side, const float> places(call, map, channels, tile, side == 6 ? 1 : 0);
  for (int64_t c = 0; c < channels; c += kLanes) {
    float* to = write(c);
    both_ways<Transform>(
        [&](int row, int column) {
          const float* from = places.at[row][column];
          return from ? load(from + c) : Lane{};
        },
        [&](int row, int column, const Lane& value) { store(to + (row * 6 + column) * stride, value); });
  }
}

}  // namespace

// The plane is [out / kPanel, 36, in, kPanel].
void transform_weight(const ConvCall& call, int64_t begin, int64_t end) {
  const int64_t stride = call.in * kPanel;
  for (int64_t out = 0; out < call.out; out += kLanes)
    for (int64_t in = begin; in < end; ++in) {
      const float* from = call.weight + in * call.weight_in + out * call.weight_out;
      float* to = call.plane + out / kPanel * kPoints * stride + in * kPanel + out % kPanel;
      both_ways<WeightTransform>(
          [&](int row, int column) {
            const float* first = from + row * call.weight_down + column * call.weight_across;
            if (call.weight_out == 1) return load(first);
            Lane lane;
            for (int i = 0; i < kLanes; ++i) lane[i] = first[i * call.weight_out];
            return lane;
          },
          [&](int row, int column, const Lane& value) { store(to + (row * 6 + column) * stride, value); });
    }
}

void convolve(const ConvCall& call, int64_t begin, int64_t end, float* scratch) {
  const int64_t in = call.in, stride = tile_stride(kTiles, in), product_stride = tile_stride(kTiles, kPanel);
  float* products = scratch + kPoints * stride;
  for (int64_t first = begin; first < end; first += kTiles) {
    const int64_t count = end - first < kTiles ? end - first : kTiles;
    for (int64_t tile = 0; tile < count; ++tile)
      transform_tile<InputTransform>(call, call.x, in, first + tile, stride,
                                     [&](int64_t c) { return scratch + tile * in + c; });
    for (int64_t panel = 0; panel < call.out; panel += kPanel) {
      for (int64_t point = 0; point < kPoints; ++point) {
        const float* weight = call.plane + (panel / kPanel * kPoints + point) * in * kPanel;
        // The last rows may belong to no tile: what an earlier one left there is multiplied, but never read.
        for (int64_t tile = 0; tile < count; tile += kRows)
          product<kRows, false>(
              in, [a = scratch + point * stride + tile * in, in](int row, int64_t k) { return a[row * in + k]; },
              weight, kPanel, products + point * product_stride + tile * kPanel, kPanel);
      }
      for (int64_t tile = 0; tile < count; ++tile) {
        const Places<4, float> places(call, call.y, call.out, first + tile, 0);
        for (int64_t c = 0; c < kPanel; c += kLanes) {
          const float* from = products + tile * kPanel + c;
          both_ways<OutputTransform>(
              [&](int row, int column) { return load(from + (row * 6 + column) * product_stride); },
              [&](int row, int column, const Lane& value) {
                if (float* to = places.at[row][column]) store(to + panel + c, value);
              });
        }
      }
    }
  }
}

// Tiles begin..end-1 of the block that starts at tile `first`: inputs as [36, in / kPanel, kBlock, kPanel], outputs as
// [36, kBlock, out].
void transform_block(const ConvCall& call, int64_t first, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    transform_tile<InputTransform>(
        call, call.x, call.in, first + tile, tile_stride(kBlock, call.in),
        [&](int64_t c) { return call.inputs + (c / kPanel * kBlock + tile) * kPanel + c % kPanel; });
    transform_tile<OutputTransposed>(call, call.grad_y, call.out, first + tile, tile_stride(kBlock, call.out),
                                     [&](int64_t c) { return call.outputs + tile * call.out + c; });
  }
}

void multiply_block(const ConvCall& call, int64_t first, int64_t begin, int64_t end) {
  const int64_t left = call.tiles - first, count = left < kBlock ? left : kBlock;
  for (int64_t point = begin; point < end; ++point)
    for (int64_t in = 0; in < call.in; in += kPanel)
      for (int64_t out = 0; out < call.out; out += kRows) {
        const float* outputs = call.outputs + point * tile_stride(kBlock, call.out) + out;
        const auto a = [outputs, stride = call.out](int row, int64_t k) { return outputs[row + k * stride]; };
        const float* b = call.inputs + point * tile_stride(kBlock, call.in) + in * kBlock;
        float* c = call.plane + (point * call.out + out) * call.in + in;
        if (first == 0)
          product<kRows, false>(count, a, b, kPanel, c, call.in);
        else
          product<kRows, true>(count, a, b, kPanel, c, call.in);
      }
}

void finish_weight(const ConvCall& call, int64_t begin, int64_t end) {
  for (int64_t out = begin; out < end; ++out)
    for (int64_t in = 0; in < call.in; in += kLanes) {
      const float* from = call.plane + out * call.in + in;
      float* to = call.grad_weight + out * 9 * call.in + in;
      both_ways<WeightTransposed>(
          [&](int row, int column) { return load(from + (row * 6 + column) * call.out * call.in); },
          [&](int row, int column, const Lane& value) { store(to + (row * 3 + column) * call.in, value); });
    }
}

}  // namespace mim4dd::MIM4DD_ISA
