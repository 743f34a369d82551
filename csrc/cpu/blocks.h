// Products of a block of kRows rows with a small weight: what the rank ops and the adapter are made
// of. The narrow side of a block, rows of rank numbers, is a Tile in fp32; the wide side is read or
// written in the tensor itself, kColumns columns at a time, once.
//
// `pad` is the padded rank, `wide` the padded width; a mask with a threshold of 0 drops nothing.
#pragma once

#include "tile.h"

namespace pelt_fast {

// Rows [row, row + rows) of a tensor `width` wide.
struct Block {
  int64_t row, width;
  int rows;
  int columns(int64_t column) const {
    return static_cast<int>(std::min<int64_t>(kColumns, width - column));
  }
};

inline int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

inline Block block_of(int64_t index, int64_t rows, int64_t width) {
  const int64_t row = index * kRows;
  return {row, width, static_cast<int>(std::min<int64_t>(kRows, rows - row))};
}

// The first block behind part number p.
inline int64_t end_of_part(int64_t p, int64_t part_rows, int64_t rows) {
  return blocks_of(std::min((p + 1) * part_rows, rows));
}

// Part number p of `parts`, made zero; null where they are.
inline float* cleared(float* parts, int64_t p, int64_t size) {
  if (parts == nullptr) return nullptr;
  std::fill_n(parts + p * size, size, 0.0f);
  return parts + p * size;
}

template <typename T>
PELT_FAST_INLINE T* place(const Rows<void>& t, int64_t row, int64_t column) {
  return t.data == nullptr ? nullptr : static_cast<T*>(t.data) + row * t.stride + column;
}

// The narrow side of a block, zeros around it.
template <typename T>
PELT_FAST_INLINE void load_narrow(Tile& tile, const Rows<void>& t, int64_t row, int rows,
                                  int64_t rank) {
  load(tile, place<T>(t, row, 0), t.stride, rows, static_cast<int>(rank));
}
template <typename T>
PELT_FAST_INLINE void store_narrow(const Tile& tile, const Rows<void>& t, int64_t row, int rows,
                                   int64_t rank) {
  store<T>(tile, nullptr, 0, place<T>(t, row, 0), t.stride, rows, static_cast<int>(rank));
}

PELT_FAST_INLINE void scale_rows(Tile& tile, int64_t pad, float scale) {
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < pad; ++j) tile[i][j] *= scale;
}

// s += drop(x) a;  a (width, pad).
template <int W, typename T>
PELT_FAST_INLINE void down_block(Tile& s, const Rows<void>& x, const float* a, int64_t pad,
                                 const Mask& mask, const Block& block) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0;
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    const T* at = place<T>(x, block.row, column);
    const float* from = &tile[0][0];
    int64_t stride = kColumns;
    if (std::is_same<T, float>::value && !drop && block.rows == kRows) {
      from = reinterpret_cast<const float*>(at);
      stride = x.stride;
    } else {
      load(tile, at, x.stride, block.rows, columns);
      if (drop) {
        draw(factor, mask, block.width, block.row, column, block.rows);
        multiply(tile, factor, block.rows);
      }
    }
    product<W>(&s[0][0], kColumns, from, stride, a + column * pad, pad, kRows, pad, columns);
  }
}

// out = drop(base) + h b + start;  b (rank, wide), start (wide) or null, base may be missing.
template <int W, typename T>
PELT_FAST_INLINE void up_block(const Tile& h, int64_t rank, const float* b, const float* start,
                               const Rows<void>& base, const Rows<void>& out, const Mask& mask,
                               const Block& block) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0;
  const int64_t wide = padded(block.width);
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    const int64_t whole = padded(columns);
    const T* from = place<T>(base, block.row, column);
    T* to = place<T>(out, block.row, column);
    const float* first = start == nullptr ? nullptr : start + column;
    if (fits_in_place<T>(block.rows, columns) && !drop) {
      auto* at = reinterpret_cast<float*>(to);
      begin(at, out.stride, reinterpret_cast<const float*>(from), base.stride, first, columns);
      product<W>(at, out.stride, &h[0][0], kColumns, b + column, wide, kRows, whole, rank);
      continue;
    }
    clear(tile, whole);
    if (first != nullptr)
      for (int i = 0; i < kRows; ++i) std::memcpy(tile[i], first, whole * sizeof(float));
    if (drop) {
      draw(factor, mask, block.width, block.row, column, block.rows);
      for (int i = 0; i < block.rows; ++i)
        for (int j = 0; j < columns; ++j)
          tile[i][j] += factor[i][j] * to_float(from[i * base.stride + j]);
      from = nullptr;
    }
    product<W>(&tile[0][0], kColumns, &h[0][0], kColumns, b + column, wide, kRows, whole, rank);
    store<T>(tile, from, base.stride, to, out.stride, block.rows, columns);
  }
}

// dh += dy b, part += dyᵀ h, bias += Σ dy, each where it is not null;  b and part (wide, pad).
template <int W, typename T>
PELT_FAST_INLINE void up_backward_block(Tile* dh, const Tile* h, const Rows<void>& dy,
                                        const float* b, float* part, float* bias, int64_t pad,
                                        const Block& block) {
  alignas(64) Tile tile;
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    load(tile, place<T>(dy, block.row, column), dy.stride, block.rows, columns);
    if (dh != nullptr)
      product<W>(&(*dh)[0][0], kColumns, &tile[0][0], kColumns, b + column * pad, pad, kRows, pad,
                 columns);
    if (part != nullptr)
      product<W, true>(part + column * pad, pad, &tile[0][0], kColumns, &(*h)[0][0], kColumns,
                       padded(columns), pad, block.rows);
    if (bias != nullptr) add_columns<W>(bias + column, tile, block.rows, padded(columns));
  }
}

// dx = base + drop(ds a), part += dsᵀ drop(x), each where it is not missing;  a and part (pad, wide).
template <int W, typename T>
PELT_FAST_INLINE void down_backward_block(const Tile& ds, int64_t rank, const float* a,
                                          const Rows<void>& base, const Rows<void>& dx,
                                          const Rows<void>& x, float* part, const Mask& mask,
                                          const Block& block) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0;
  const int64_t pad = padded(rank), wide = padded(block.width);
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    const int64_t whole = padded(columns);
    if (drop) draw(factor, mask, block.width, block.row, column, block.rows);
    const T* from = place<T>(base, block.row, column);
    T* to = place<T>(dx, block.row, column);
    if (to != nullptr && fits_in_place<T>(block.rows, columns) && !drop) {
      auto* at = reinterpret_cast<float*>(to);
      begin(at, dx.stride, reinterpret_cast<const float*>(from), base.stride, nullptr, columns);
      product<W>(at, dx.stride, &ds[0][0], kColumns, a + column, wide, kRows, whole, rank);
    } else if (to != nullptr) {
      clear(tile, whole);
      product<W>(&tile[0][0], kColumns, &ds[0][0], kColumns, a + column, wide, kRows, whole, rank);
      if (drop) multiply(tile, factor, block.rows);
      store<T>(tile, from, base.stride, to, dx.stride, block.rows, columns);
    }
    if (part != nullptr) {
      load(tile, place<T>(x, block.row, column), x.stride, block.rows, columns);
      if (drop) multiply(tile, factor, block.rows);
      product<W, true>(part + column, wide, &ds[0][0], kColumns, &tile[0][0], kColumns, pad, whole,
                       block.rows);
    }
  }
}

}  // namespace pelt_fast
