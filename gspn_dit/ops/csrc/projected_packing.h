// Between tensors in storage precision and what the kernels read and write: dense vectors in the accumulation type.
#include "projected_backward.h"

namespace gspn {
namespace GSPN_ISA {

// Takes pieces of one piece of memory; without any it only counts.
struct Pieces {
  char* memory;
  int64_t bytes = 0;

  template <class A> A* take(int64_t count) {
    A* piece = memory ? (A*)(memory + bytes) : nullptr;
    bytes += (count * (int64_t)sizeof(A) + 63) / 64 * 64;
    return piece;
  }
};

// The sizes of one call, in the vectors of an instruction set.
template <class A> struct Grid {
  static constexpr int L = kLanes<A>;
  int64_t height, width, tokens, channels, vectors, padded;
  int64_t pitch, plane;  // elements between rows of a plane of vectors, and of a plane; an odd pitch spreads columns over cache sets
  int64_t longest;

  explicit Grid(const Projected& call)
      : height(call.height), width(call.width), tokens(call.height * call.width), channels(call.channels) {
    vectors = (channels + L - 1) / L;
    padded = (call.proxy_channels + kProxyPadding - 1) / kProxyPadding * kProxyPadding;
    pitch = (width | 1) * L;
    plane = height * pitch;
    longest = height > width ? height : width;
  }
  int64_t panel(int64_t q) const { return padded * q * L; }
};

template <class A> static Sweep make_sweep(const Projected& call, const Grid<A>& grid, int64_t direction) {
  Sweep sweep;
  sweep.columns = direction == kRight || direction == kLeft;
  sweep.reverse = direction == kLeft || direction == kUp;
  sweep.lines = sweep.columns ? call.width : call.height;
  sweep.positions = sweep.columns ? call.height : call.width;
  sweep.window = call.window;
  sweep.line_step = sweep.columns ? grid.L : grid.pitch;
  sweep.position_step = sweep.columns ? grid.pitch : grid.L;
  return sweep;
}

// The orientation of rows (0) or of columns (1), whatever the directions.
template <class A> static Sweep orientation_sweep(const Projected& call, const Grid<A>& grid, int64_t columns) {
  return make_sweep(call, grid, columns ? kRight : kDown);
}

// Tokens by which planes are fetched before they are copied: their rows are too far apart for the processor to foresee.
constexpr int64_t kAhead = 8;

// `count` planes of vectors of one sample's tokens, from or to a tensor whose strides are those of height and width.
template <class T, class A>
static void read_planes(const Grid<A>& grid, const T* from, const int64_t* stride, int64_t vector, int64_t count, A* planes) {
  for (int64_t h = 0; h < grid.height; ++h)
    for (int64_t w = 0; w < grid.width; ++w) {
      const int64_t later = w + kAhead < grid.width ? kAhead * stride[1] : stride[0] + (kAhead - grid.width) * stride[1];
      for (int64_t v = 0; v < count; ++v) {
        const int64_t channel = (vector + v) * grid.L;
        prefetch(from + h * stride[0] + w * stride[1] + channel + later);
        store_one(planes + v * grid.plane + h * grid.pitch + w * grid.L,
                  load_lanes(from + h * stride[0] + w * stride[1] + channel, grid.channels - channel));
      }
    }
}
template <class T, class A>
static void write_planes(const Grid<A>& grid, const A* planes, int64_t vector, int64_t count, T* to) {
  for (int64_t h = 0; h < grid.height; ++h)
    for (int64_t w = 0; w < grid.width; ++w)
      for (int64_t v = 0; v < count; ++v) {
        const int64_t channel = (vector + v) * grid.L;
        prefetch(to + (h * grid.width + w + kAhead) * grid.channels + channel);
        store_lanes(to + (h * grid.width + w) * grid.channels + channel,
                    load_one(planes + v * grid.plane + h * grid.pitch + w * grid.L), grid.channels - channel);
      }
}

template <class T, class A> static void read_row(const T* from, int64_t count, A* to) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) store_one(to + j, load_one(from + j));
  if (j < count) {
    const Vector<A> rest = load_lanes(from + j, count - j);
    memcpy(to + j, &rest, (count - j) * sizeof(A));
  }
}
template <class T, class A> static void write_row(const A* from, int64_t count, T* to) {
  int64_t j = 0;
  for (; j + kLanes<A> <= count; j += kLanes<A>) store_one(to + j, load_one(from + j));
  if (j < count) store_lanes(to + j, load_lanes(from + j, count - j), count - j);
}

// A sample's proxies in the order of rows, or of columns: [H, W, padded P] or [W, H, padded P].
template <class T, class A>
static void read_proxies(const Projected& call, const Grid<A>& grid, int64_t batch, bool columns, A* to) {
  const int64_t *stride = call.proxy_stride, lines = columns ? grid.width : grid.height, positions = grid.tokens / lines;
  const T* from = (const T*)call.proxy + batch * stride[0];
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t n = 0; n < positions; ++n, to += grid.padded) {
      read_row(from + i * stride[columns ? 2 : 1] + n * stride[columns ? 1 : 2], call.proxy_channels, to);
      for (int64_t p = call.proxy_channels; p < grid.padded; ++p) to[p] = 0;
    }
}

// The same as tiles: [H, tiles of a row, blocks] or [W, tiles of a column, blocks].
template <class A>
static void read_proxy_tiles(const Projected& call, const Grid<A>& grid, int64_t batch, bool columns, BFloat16* to) {
  const int64_t *stride = call.proxy_stride, lines = columns ? grid.width : grid.height, positions = grid.tokens / lines;
  const int64_t blocks = tile_blocks(call.proxy_channels), rows = line_tiles(positions) * kTileRows;
  const BFloat16* from = (const BFloat16*)call.proxy + batch * stride[0];
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t n = 0; n < rows; ++n) {
      const bool inside = n < positions;
      read_tile_row(inside ? from + i * stride[columns ? 2 : 1] + n * stride[columns ? 1 : 2] : from,
                    inside ? call.proxy_channels : 0, blocks,
                    to + (i * rows + n) / kTileRows * blocks * kTileElements + n % kTileRows * kTileDepth);
    }
}

// A weight [K, P] of the call, or its gradient: which row belongs to a channel, and what its panel holds times what.
struct Map {
  int64_t offset, group;  // first row; channels that share a row
  double scale;
  int which;  // 0: logits, 1: input gate, 2: output gate, 3: skip

  Map(const Projected& call, int64_t d, int q) {
    const bool logits = q < kInputGate;
    group = logits ? call.channels / call.groups : 1;
    offset = logits ? (d * 3 + q) * call.groups : d * call.channels;
    scale = q == kOutputGate ? call.merge[d] : 1;
    which = logits ? 0 : q - kInputGate + 1;
  }
  static Map skip(const Projected& call) {
    Map map(call, 0, kInputGate);
    map.which = 3;
    return map;
  }
  const void* weight(const Projected& call) const {
    const void* all[] = {call.logits_weight, call.input_gate_weight, call.output_gate_weight, call.skip_weight};
    return all[which];
  }
  void* gradient(const Projected& call) const {
    void* all[] = {call.grad_logits_weight, call.grad_input_gate_weight, call.grad_output_gate_weight, call.grad_skip_weight};
    return all[which];
  }
};

// Elements of the scratch of `read_weight`: a row for each lane, of whole vectors.
template <class A> static int64_t weight_scratch(const Grid<A>& grid) {
  return grid.L * ((grid.padded + grid.L - 1) / grid.L * grid.L);
}

// The logits' weights of all groups of a direction: [G, padded P, 3].
template <class T, class A>
static void read_shared_weights(const Projected& call, const Grid<A>& grid, int64_t d, A* row, A* panels) {
  memset(panels, 0, call.groups * grid.padded * 3 * sizeof(A));
  for (int64_t g = 0; g < call.groups; ++g)
    for (int k = 0; k < 3; ++k) {
      read_row((const T*)call.logits_weight + ((d * 3 + k) * call.groups + g) * call.proxy_channels, call.proxy_channels, row);
      for (int64_t p = 0; p < call.proxy_channels; ++p) panels[(g * grid.padded + p) * 3 + k] = row[p];
    }
}

// Weight q of the Q of one vector's panel.
template <class T, int Q, class A>
static void read_weight(const Projected& call, const Grid<A>& grid, const Map& map, int64_t vector, int q, A* rows, A* panel) {
  constexpr int L = kLanes<A>;
  const int64_t proxies = call.proxy_channels, length = weight_scratch(grid) / L;
  memset(rows, 0, L * length * sizeof(A));
  for (int64_t lane = 0; lane < L && vector * L + lane < call.channels; ++lane)
    read_row((const T*)map.weight(call) + (map.offset + (vector * L + lane) / map.group) * proxies, proxies, rows + lane * length);
  for (int64_t p = 0; p < grid.padded; p += L) {
    Vector<A> square[L];
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) square[j] = load_one(rows + j * length + p);
    transpose(square);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j)
      if (p + j < grid.padded) store_one(panel + ((p + j) * Q + q) * L, square[j] * all((A)map.scale));
  }
}

// Weight q of the Q of one vector's panel as tiles, [blocks, Q]; `rows` is room for tiles of it [blocks] as if it were proxies.
template <class A>
static void read_weight_tiles(const Projected& call, const Grid<A>& grid, const Map& map, int64_t vector, int q, int Q,
                              BFloat16* rows, BFloat16* tiles) {
  constexpr int L = kLanes<A>;
  const int64_t proxies = call.proxy_channels, blocks = tile_blocks(proxies);
  const BFloat16* weight = (const BFloat16*)map.weight(call);
  for (int64_t lane = 0; lane < L; ++lane) {
    const int64_t channel = vector * L + lane;
    const bool inside = channel < grid.channels;
    read_tile_row(inside ? weight + (map.offset + channel / map.group) * proxies : weight, inside ? proxies : 0, blocks,
                  rows + lane * kTileDepth);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    Vector<A> square[L];  // of pairs of values
    memcpy(square, rows + block * kTileElements, sizeof(square));
    transpose(square);
    memcpy(tiles + (block * Q + q) * kTileElements, square, sizeof(square));
  }
}

// The gradient of weight q of the Q in all panels, whose vectors lie `stride` apart, and its product with the weight.
template <class T, int Q, class A>
static double write_weight(const Projected& call, const Grid<A>& grid, const Map& map, int q, const A* panels, A* row, A* sum) {
  constexpr int L = kLanes<A>;
  const int64_t proxies = call.proxy_channels, rows = call.channels / map.group;
  const A scale = (A)map.scale;
  double product = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t offset = (map.offset + r) * proxies;
    for (int64_t c = r * map.group; c < (r + 1) * map.group; ++c) {
      const A* from = panels + c / L * grid.panel(Q) + q * L + c % L;
      for (int64_t p = 0; p < proxies; ++p) sum[p] = (c > r * map.group ? sum[p] : 0) + from[p * Q * L];
    }
    read_row((const T*)map.weight(call) + offset, proxies, row);
    for (int64_t p = 0; p < proxies; ++p) {
      product += (double)sum[p] * (double)row[p];
      sum[p] *= scale;
    }
    write_row(sum, proxies, (T*)map.gradient(call) + offset);
  }
  return product;
}

}  // namespace GSPN_ISA
}  // namespace gspn
