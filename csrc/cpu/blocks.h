// Products of a block of kRows rows with a small weight: what the rank ops and the adapter are made
// of. The narrow side of a block, rows of rank numbers, is a Tile in fp32; the wide side is read or
// written in the tensor itself, kColumns columns at a time, once.
//
// `pad` is the padded rank, `wide` the padded width; a mask with a threshold of 0 drops nothing.
#pragma once

#include "tile.h"

namespace pelt_fast {

// Rows [row, row + rows) of a tensor `width` wide, or the rows `at`. Their rows in the dropout mask
// are those from `drawn` on, or `drawn_at`.
struct Block {
  int64_t row, width;
  int rows;
  bool in_place;  // whether a product may read and write whole rows of fp32 in the tensor itself
  int64_t drawn;
  const int64_t *at, *drawn_at;

  int columns(int64_t column) const {
    return static_cast<int>(std::min<int64_t>(kColumns, width - column));
  }
  int64_t row_of(int i) const { return at == nullptr ? row + i : at[i]; }
  int64_t drawn_of(int i) const { return drawn_at == nullptr ? drawn + i : drawn_at[i]; }
  int64_t products() const { return padded(rows, 8); }  // rows of a product
};

inline int64_t blocks_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

inline Block block_of(int64_t index, int64_t rows, int64_t width) {
  const int64_t row = index * kRows;
  const int count = static_cast<int>(std::min<int64_t>(kRows, rows - row));
  return {row, width, count, count == kRows, row, nullptr, nullptr};
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

// `columns` of a block from `column` on, zeros around them.
template <typename T>
PELT_FAST_INLINE void load_block(Tile& tile, const Rows<void>& t, const Block& block,
                                 int64_t column, int columns) {
  if (block.at == nullptr)
    return load(tile, place<T>(t, block.row, column), t.stride, block.rows, columns);
  const auto pad = static_cast<int>(padded(columns));
  for (int i = 0; i < kRows; ++i) {
    const int width = i < block.rows ? columns : 0;
    const T* from = i < block.rows ? place<T>(t, block.at[i], column) : nullptr;
    for (int j = 0; j < width; ++j) tile[i][j] = to_float(from[j]);
    for (int j = width; j < pad; ++j) tile[i][j] = 0;
  }
}

// out = base + tile, or tile alone, `columns` of a block from `column` on.
template <typename T>
PELT_FAST_INLINE void store_block(const Tile& tile, const Rows<void>& base, const Rows<void>& out,
                                  const Block& block, int64_t column, int columns) {
  if (block.at == nullptr)
    return store<T>(tile, place<T>(base, block.row, column), base.stride,
                    place<T>(out, block.row, column), out.stride, block.rows, columns);
  for (int i = 0; i < block.rows; ++i) {
    const T* from = place<T>(base, block.at[i], column);
    T* to = place<T>(out, block.at[i], column);
#pragma GCC ivdep
    for (int j = 0; j < columns; ++j)
      assign(to[j], from == nullptr ? tile[i][j] : to_float(from[j]) + tile[i][j]);
  }
}

// The narrow side of a block, zeros around it.
template <typename T>
PELT_FAST_INLINE void load_narrow(Tile& tile, const Rows<void>& t, const Block& block,
                                  int64_t rank) {
  load_block<T>(tile, t, block, 0, static_cast<int>(rank));
}
template <typename T>
PELT_FAST_INLINE void store_narrow(const Tile& tile, const Rows<void>& t, const Block& block,
                                   int64_t rank) {
  store_block<T>(tile, Rows<void>{}, t, block, 0, static_cast<int>(rank));
}

// 0 or 1 / (1 - p) for the elements of a block from `column` on.
PELT_FAST_INLINE void draw_block(Tile& factor, const Mask& mask, const Block& block,
                                 int64_t column) {
  for (int i = 0; i < block.rows; ++i)
    draw_row(factor[i], mask, block.width, block.drawn_of(i), column);
}

// Whether a product can be added to the tensor itself: whole rows of fp32, whole vectors.
template <typename T>
PELT_FAST_INLINE bool fits_in_place(const Block& block, int columns) {
  return std::is_same<T, float>::value && block.in_place && columns % kPad == 0;
}

PELT_FAST_INLINE void scale_rows(Tile& tile, int64_t pad, float scale) {
  for (int i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < pad; ++j) tile[i][j] *= scale;
}

// s += drop(x) a of the columns of a tile;  a (columns, pad).
template <int W, typename T>
PELT_FAST_INLINE void down_tile(Tile& s, const Rows<void>& x, const float* a, int64_t pad,
                                const Mask& mask, const Block& block, int64_t column) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0;
  const int columns = block.columns(column);
  const float* from = &tile[0][0];
  int64_t stride = kColumns;
  if (std::is_same<T, float>::value && !drop && block.in_place) {
    from = reinterpret_cast<const float*>(place<T>(x, block.row, column));
    stride = x.stride;
  } else {
    load_block<T>(tile, x, block, column, columns);
    if (drop) {
      draw_block(factor, mask, block, column);
      multiply(tile, factor, block.rows);
    }
  }
  product<W>(&s[0][0], kColumns, from, stride, a, pad, block.products(), pad, columns);
}

// The same for all columns;  a (width, pad).
template <int W, typename T>
PELT_FAST_INLINE void down_block(Tile& s, const Rows<void>& x, const float* a, int64_t pad,
                                 const Mask& mask, const Block& block) {
  for (int64_t column = 0; column < block.width; column += kColumns)
    down_tile<W, T>(s, x, a + column * pad, pad, mask, block, column);
}

// out = drop(base) + h b + start in the columns of a tile;  b (rank, stride), start or null and base
// may be missing.
template <int W, typename T>
PELT_FAST_INLINE void up_tile(const Tile& h, int64_t rank, const float* b, int64_t stride,
                              const float* start, const Rows<void>& base, const Rows<void>& out,
                              const Mask& mask, const Block& block, int64_t column) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0;
  const int columns = block.columns(column);
  const int64_t whole = padded(columns), rows = block.products();
  if (fits_in_place<T>(block, columns) && !drop) {
    auto* at = reinterpret_cast<float*>(place<T>(out, block.row, column));
    begin(at, out.stride, reinterpret_cast<const float*>(place<T>(base, block.row, column)),
          base.stride, start, block.rows, columns);
    return product<W>(at, out.stride, &h[0][0], kColumns, b, stride, rows, whole, rank);
  }
  clear(tile, whole, rows);
  if (start != nullptr)
    for (int i = 0; i < block.rows; ++i) std::memcpy(tile[i], start, whole * sizeof(float));
  if (drop) {
    draw_block(factor, mask, block, column);
    for (int i = 0; i < block.rows; ++i) {
      const T* from = place<T>(base, block.row_of(i), column);
      for (int j = 0; j < columns; ++j) tile[i][j] += factor[i][j] * to_float(from[j]);
    }
  }
  product<W>(&tile[0][0], kColumns, &h[0][0], kColumns, b, stride, rows, whole, rank);
  store_block<T>(tile, drop ? Rows<void>{} : base, out, block, column, columns);
}

// The same for all columns;  b (rank, wide), start (wide).
template <int W, typename T>
PELT_FAST_INLINE void up_block(const Tile& h, int64_t rank, const float* b, const float* start,
                               const Rows<void>& base, const Rows<void>& out, const Mask& mask,
                               const Block& block) {
  for (int64_t column = 0; column < block.width; column += kColumns)
    up_tile<W, T>(h, rank, b + column, padded(block.width),
                  start == nullptr ? nullptr : start + column, base, out, mask, block, column);
}

// dh += dy b, part += dyᵀ h, bias += Σ dy, each where it is not null;  b and part (wide, pad).
template <int W, typename T>
PELT_FAST_INLINE void up_backward_block(Tile* dh, const Tile* h, const Rows<void>& dy,
                                        const float* b, float* part, float* bias, int64_t pad,
                                        const Block& block) {
  alignas(64) Tile tile;
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    load_block<T>(tile, dy, block, column, columns);
    if (dh != nullptr)
      product<W>(&(*dh)[0][0], kColumns, &tile[0][0], kColumns, b + column * pad, pad,
                 block.products(), pad, columns);
    if (part != nullptr)
      product<W, true>(part + column * pad, pad, &tile[0][0], kColumns, &(*h)[0][0], kColumns,
                       padded(columns), pad, block.rows);
    if (bias != nullptr) add_columns<W>(bias + column, tile, block.rows, padded(columns));
  }
}

// dx = base + drop(ds a), part += dsᵀ drop(x), each where it is not missing;  a (rank, wide), part
// (pad, wide), pad a multiple of 8.
template <int W, typename T>
PELT_FAST_INLINE void down_backward_block(const Tile& ds, int64_t rank, int64_t pad, const float* a,
                                          const Rows<void>& base, const Rows<void>& dx,
                                          const Rows<void>& x, float* part, const Mask& mask,
                                          const Block& block) {
  alignas(64) Tile tile, factor;
  const bool drop = mask.threshold > 0, need_dx = dx.data != nullptr;
  const int64_t wide = padded(block.width), rows = block.products();
  for (int64_t column = 0; column < block.width; column += kColumns) {
    const int columns = block.columns(column);
    const int64_t whole = padded(columns);
    if (drop) draw_block(factor, mask, block, column);
    if (need_dx && fits_in_place<T>(block, columns) && !drop) {
      auto* at = reinterpret_cast<float*>(place<T>(dx, block.row, column));
      begin(at, dx.stride, reinterpret_cast<const float*>(place<T>(base, block.row, column)),
            base.stride, nullptr, block.rows, columns);
      product<W>(at, dx.stride, &ds[0][0], kColumns, a + column, wide, rows, whole, rank);
    } else if (need_dx) {
      clear(tile, whole, rows);
      product<W>(&tile[0][0], kColumns, &ds[0][0], kColumns, a + column, wide, rows, whole, rank);
      if (drop) multiply(tile, factor, block.rows);
      store_block<T>(tile, base, dx, block, column, columns);
    }
    if (part != nullptr) {
      load_block<T>(tile, x, block, column, columns);
      if (drop) multiply(tile, factor, block.rows);
      product<W, true>(part + column, wide, &ds[0][0], kColumns, &tile[0][0], kColumns, pad, whole,
                       block.rows);
    }
  }
}

}  // namespace pelt_fast
