// The products of projected_products.h of proxies and weights in bfloat16, by matrix instructions (AMX): they multiply tiles of
// bfloat16 and add in float32.
#include "projected_products.h"

namespace gspn {
namespace GSPN_ISA {

#if defined(__AMX_BF16__)
constexpr bool kMatrices = true;  // and all storage is bfloat16: see projected_table.h
#else
constexpr bool kMatrices = false;
#endif

// A tile of proxies holds 32 values of 16 positions, one of weights 32 values of 16 channels, in pairs: [16, 16, 2]. What does not
// fill a tile is followed by zeros.
constexpr int64_t kTileRows = 16, kTileDepth = 32, kTileElements = kTileRows * kTileDepth;

static GSPN_INLINE int64_t tile_blocks(int64_t proxies) { return (proxies + kTileDepth - 1) / kTileDepth; }
static GSPN_INLINE int64_t line_tiles(int64_t positions) { return (positions + kTileRows - 1) / kTileRows; }

// While it lives, the thread's tiles have 16 rows of 64 bytes; afterwards they are shaped as before.
class TileShape {
#if defined(__AMX_BF16__)
 public:
  TileShape() {
    Configuration wanted = {};
    wanted.palette = 1;
    for (int tile = 0; tile < 8; ++tile) wanted.row_bytes[tile] = 64, wanted.rows[tile] = kTileRows;
    _tile_storeconfig(&before);
    load(wanted);
  }
  TileShape(const TileShape&) = delete;
  ~TileShape() { load(before); }

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static void load(const Configuration& configuration) {
    asm volatile("" ::"m"(configuration));  // all of it, of which the intrinsic names the beginning alone
    _tile_loadconfig(&configuration);
  }
  Configuration before = {};
#endif
};

// Products of 16 positions, [16, Q, 16], from their proxies' tiles [blocks] and the first Q of `Of` weights' [blocks, Of].
template <int Q, int Of>
static GSPN_INLINE void project_tiles(const BFloat16* weights, const BFloat16* proxies, int64_t blocks, float* products) {
#if defined(__AMX_BF16__)
  static_assert(Q == 2 || Q == 5, "two gates, with three logits or without");
  constexpr int64_t pitch = Q * 64;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Q > 2) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
  }
  for (int64_t block = 0; block < blocks; ++block, weights += Of * kTileElements, proxies += kTileElements) {
    _tile_loadd(5, proxies, 64);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, weights + kTileElements, 64);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (Q > 2) {
      _tile_loadd(6, weights + 2 * kTileElements, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, weights + 3 * kTileElements, 64);
      _tile_dpbf16ps(3, 5, 7);
      _tile_loadd(6, weights + 4 * kTileElements, 64);
      _tile_dpbf16ps(4, 5, 6);
    }
  }
  _tile_stored(0, products, pitch);
  _tile_stored(1, products + 16, pitch);
  if constexpr (Q > 2) {
    _tile_stored(2, products + 32, pitch);
    _tile_stored(3, products + 48, pitch);
    _tile_stored(4, products + 64, pitch);
  }
#endif
}

// Copy `count` values into a row of tiles.
static void read_tile_row(const BFloat16* from, int64_t count, int64_t blocks, BFloat16* row) {
  for (int64_t block = 0; block < blocks; ++block, row += kTileElements) {
    const int64_t left = count - block * kTileDepth, some = left < 0 ? 0 : left < kTileDepth ? left : kTileDepth;
    memcpy(row, from + count - left, some * sizeof(BFloat16));
    memset(row + some, 0, (kTileDepth - some) * sizeof(BFloat16));
  }
}

}  // namespace GSPN_ISA
}  // namespace gspn
