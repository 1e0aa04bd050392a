// Hides from each row of an accumulator of scores the keys that its query does not see.
#pragma once

#include "cuda/attention/shared/block_range.h"
#include "cuda/attention/shared/scalar.h"
#include "cuda/tile/accumulator.h"

namespace drope::cuda {

// acc_s: scores of keys first_key + column; keys[h] is what row h of this thread sees.
template <int kSize>
__device__ __forceinline__ void mask_scores(float (&acc_s)[kSize],
                                            const KeyRange (&keys)[tile::kRowsPerThread],
                                            int first_key) {
  // Counted from the thread's first column, so that columns are constants.
  const int first = first_key + tile::accumulator_col(0, 0);
  const KeyRange seen[] = {{keys[0].begin - first, keys[0].end - first},
                           {keys[1].begin - first, keys[1].end - first}};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int col = 8 * (i / 4) + i % 2, h = i / 2 % 2;
    if (col < seen[h].begin || col >= seen[h].end) acc_s[i] = -infinity();
  }
}

// acc_s: scores of queries first_query + (the 16 rows of this warp); `visible` is a Visibility, or
// a TileVisibility whose queries count from the first of the tile.
template <int kSize, class Visible>
__device__ __forceinline__ void mask_scores(float (&acc_s)[kSize], const Visible& visible,
                                            int first_query, int first_key) {
  KeyRange keys[tile::kRowsPerThread];
#pragma unroll
  for (int h = 0; h < tile::kRowsPerThread; ++h) {
    keys[h] = visible.keys_of(first_query + tile::accumulator_row(h));
  }
  mask_scores(acc_s, keys, first_key);
}

// acc_st: transposed scores, keys are rows and queries first_query + column. seeing[r]: the queries
// that see the key of row r.
template <int kSize>
__device__ __forceinline__ void mask_transposed_scores(float (&acc_st)[kSize],
                                                       const RowRange* seeing, int first_query) {
  RowRange queries[tile::kRowsPerThread];
#pragma unroll
  for (int h = 0; h < tile::kRowsPerThread; ++h) {
    queries[h] = seeing[tile::accumulator_row(h)];
    queries[h] = {queries[h].begin - first_query, queries[h].end - first_query};
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const int col = tile::accumulator_col(i / 4, i % 2), h = i / 2 % 2;
    if (col < queries[h].begin || col >= queries[h].end) acc_st[i] = -infinity();
  }
}

}  // namespace drope::cuda
