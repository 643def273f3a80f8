// Whole encoders with 8-bit activations: the layers of BERT, RoBERTa and DistilBERT, which norm what they have added.
//
//   h = norm(h + out(attention(qkv(h)))),  h = norm(h + down(gelu(up(h))))
//
// Every linear takes its input as int8 codes with a scale per token; some columns, the same for all tokens, stay exact:
//
//   y[m][n] = sum over groups g of scale_mg scale_gn (sum_{k in g} (q_mk - zero) level_nk)
//             + sum over exact columns of x_mk w_nk + bias_n
//
// q has 8 bits, or 16 where inputs are not meant to be quantized: then groups have at most 128 columns, whose sums fit int32.
// Codes are unsigned and levels signed, so that the sums of levels, which zero is multiplied by, are known beforehand.
#pragma once
#include <atomic>

#include "int8.h"

typedef struct {
  const int8_t* panels;    // (ceil(out / 48), stride / 4, 48, 4): levels, 0 where there is no weight
  const float* scale;      // (ceil(out / 48), groups, 48)
  const int32_t* start;    // (ceil(out / 48), groups, 48): -zero sum_k level_nk
  const float* bias;       // (ceil(out / 48), 48): with low sum_k w_nk in it
  const float* exact;      // (ceil(out / 48), exact_count, 48)
  const int32_t* columns;  // (exact_count): columns of x that stay exact
  int64_t in, out, stride, group_size, groups, exact_count;  // stride: in, padded to 64 columns
  int32_t per_group;       // whether every group of a token has a scale of its own
  int32_t wide;            // whether codes have 16 bits: their upper bytes, and behind these their lower ones
  int32_t zero;            // half the codes: they are symmetric about it; 0: they count from `low` on
  float low;
} whit_linear8;

typedef struct {
  whit_linear8 qkv, out, up, down;
  const float *norm_weight[2], *norm_bias[2];
} whit_layer8;

// What makes the first layer's input of tokens: norm(word[id] + beside[position]).
typedef struct {
  const int64_t* ids;   // (batch, tokens), or null: `hidden` is given
  const float *word, *beside, *norm_weight, *norm_bias;  // (words, size), (at least tokens, size), (size) twice
  int64_t words;
} whit_embedding8;

// hidden (batch, tokens, size) float32 is replaced. mask: bytes, 0 where a token does not see another, or null.
struct whit_encoder8 {
  const whit_layer8* layers;
  int64_t count, size, inner, heads;
  float epsilon;
  float* hidden;
  int64_t batch, tokens;
  const uint8_t* mask;
  int64_t mask_batch, mask_query, mask_key;  // strides in bytes
  whit_embedding8 embedding;
};

void whit_yield();

// What the threads that work on the same sequences share.
struct Crew {
  std::atomic<int64_t> next{0};
  std::atomic<int> arrived{0}, turn{0};
  int size = 1;
};

// Memory of a crew for `rows` tokens at most; the last one is each thread's own.
struct Room8 {
  float *wide, *inner, *context, *scale, *exact;  // (rows, 3 size), (rows, inner), (rows, size), (rows, most) twice
  uint8_t* codes;                                 // (rows, bytes of the widest)
  float *own, *totals;                            // what a task needs beside it; (rows, 48)
};
