// A decoder of Llama's kind, one token at a time: the plan of a model, and what an instruction set does between products.
//
// Everything between two products is rounded to the model's type where transformers' graph rounds it, and float32 sums
// are taken in the order in which torch takes them, so that the likeliest tokens are those of the model's own forward.
#pragma once
#include "int8.h"

enum { WHIT_SPLIT = 512 };  // keys that share a maximum while attention goes past them, as torch's kernel cuts them

enum whit_inputs { WHIT_EXACT = 0, WHIT_PER_GROUP = 1, WHIT_PER_ROW = 2 };

typedef struct whit_matrix {
  const whit_weight* packed;  // or null, where floats of the model's type (rows, columns) lie at `dense`
  const void *dense, *bias;   // bias (rows) of the model's type, or null
  const uint8_t* table;       // of int8 products: stored levels by code, or null; level = (stored - shift) unit
  int64_t rows, columns;
  int32_t inputs, shift;      // how the inputs are quantized: one of whit_inputs
  float unit;
  const struct whit_matrix* bands;  // of an embedding or a head: `band_count` matrices that have its rows, or null
  const int64_t* places;            // where each row lies when the bands lie one below the other
  int64_t band_count;
} whit_matrix;

typedef struct {
  const void *attention_norm, *mlp_norm, *q_norm, *k_norm;  // weights of the model's type; the last two or null
  whit_matrix q, k, v, o, gate, up, down;
  void *keys, *values;        // (kv_heads, capacity, head_dim) of the model's type
} whit_block;

typedef struct {
  const whit_block* block;
  int64_t blocks, hidden, intermediate, vocabulary, heads, kv_heads, head_dim, capacity;
  const void *norm, *cos, *sin;  // (hidden), and (capacity, head_dim) twice, of the model's type
  whit_matrix embedding, head;
  float epsilon, scale;       // of the norms; of queries times keys
  int32_t type, isa, isa8, threads;
  whit_parallel parallel;     // null: one thread
  int (*team_size)(void), (*team_member)(void);
} whit_decoder;

struct Attention {  // one head over `length` keys and values
  const void *q, *keys, *values;
  void* out;
  int64_t length, dim;
  float scale;
  int type;
  float *scores, *sums;  // room for WHIT_SPLIT + 16 and dim + 16 floats
};

struct Steps {
  // out = weight * (x / sqrt(mean x^2 + epsilon)), n of them; `room` holds n + 16 floats
  void (*norm)(const void* x, const void* weight, int64_t n, float epsilon, int type, float* room, void* out);
  void (*rotate)(void* x, const void* cos, const void* sin, int64_t dim, int type);
  void (*attend)(const Attention&);
  void (*gate)(void* gate, const void* up, int64_t n, int type);  // gate = silu(gate) * up
  void (*add)(void* x, const void* y, int64_t n, int type);       // x += y
  void (*floats)(const void* x, int64_t n, int type, float* out);
  void (*dense)(const whit_matrix&, const float* x, int64_t first, int64_t last, void* y, int type);
};

extern const Steps whit_steps_scalar, whit_steps_avx2, whit_steps_avx512;
