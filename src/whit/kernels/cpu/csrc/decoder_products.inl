// Products of one vector with a member's rows of a matrix, by the kernel that the matrix has. Included by decoder.cpp.
//
// A member keeps its inputs in the order in which a kernel meets them for as long as further matrices want the same.

namespace {

enum { ALIGNED_ROWS = 8 };  // of which members' shares of a matrix are multiples

// Whether the inputs lie in that order already; if not, they are marked as such, and the caller puts them there.
bool arranged(Inputs& now, const void* x, const whit_matrix& m, const void* kernels, int codes, int64_t group_size) {
  if (now.x == x && now.columns == m.columns && now.inputs == m.inputs && now.kernels == kernels &&
      now.codes == codes && now.group_size == group_size)
    return true;
  now.x = x, now.columns = m.columns, now.inputs = m.inputs, now.kernels = kernels;
  now.codes = codes, now.group_size = group_size;
  return false;
}

// bfloat16 as bytes, as whit_linear takes it on such processors; false where these inputs or weights are none for that.
bool by_planes(Member& me, const whit_matrix& m, const void* x, void* y, int64_t first, int64_t last) {
  const whit_weight& w = *m.packed;
  const PlaneKernels* kernels = whit_plane_kernels(w, me.d.type, me.d.isa);
  if (!kernels) return false;
  Planes& p = me.inputs.planes;
  if (!arranged(me.inputs, x, m, kernels, w.bits, w.group_size)) {
    p = {}, p.w = &w;
    if (!kernels->arrange(p, x, 1, me.inputs.room)) {
      me.inputs.x = nullptr;
      return false;
    }
  }
  p.w = &w, p.bias = m.bias, p.y = y, p.type = me.d.type, p.shift = (int)-w.levels[0];
  kernels->dot(p, 1, first, last, me.params);
  return true;
}

// Floats as they are, through packed weights.
void exact(Member& me, const whit_matrix& m, const void* x, void* y, int64_t first, int64_t last) {
  if (by_planes(me, m, x, y, first, last)) return;
  const whit_weight& w = *m.packed;
  const Kernels& kernels = *whit_kernels(w, me.d.type, me.d.isa);
  const int codes = w.bits <= 2 ? 16 : w.bits <= 4 ? 8 : 4;
  const bool digits = takes_digits(kernels, w);
  Rows& rows = me.inputs.rows;
  if (arranged(me.inputs, x, m, &kernels, digits ? 0 : codes, 0)) {
  } else if (digits) {
    rows.x = me.inputs.room;
    kernels.arrange_digits(x, w.columns, me.inputs.room);
  } else {
    rows.blocks = (w.columns + 16 * codes - 1) / (16 * codes), rows.sum_count = 16 * rows.blocks;
    rows.x_bytes = rows.blocks * 16 * codes * (kernels.pairs ? 2 : 4);
    rows.x = me.inputs.room, rows.sums = (float*)(me.inputs.room + rows.x_bytes);
    kernels.arrange(x, me.d.type, w.columns, w.bits, me.inputs.room, (float*)(me.inputs.room + rows.x_bytes));
  }
  rows.w = &w, rows.m = 1, rows.bias = m.bias, rows.y = y, rows.type = me.d.type;
  if (digits) return kernels.dot_digits(rows, first, last);
  const bool done = by_tiles(w, kernels, first, last, [&](const whit_weight& part, int64_t from, int64_t to) {
    rows.w = &part;
    kernels.dot(rows, from, to, me.params);
  });
  if (!done) me.run.failed = 1;
}

// Inputs rounded to int8.
void quantized(Member& me, const whit_matrix& m, const void* x, void* y, int64_t first, int64_t last) {
  const whit_weight& w = *m.packed;
  const Kernels8& kernels = *whit_kernels8(me.d.isa8);
  Product8& p = me.inputs.product;
  whit_rows8& q = me.inputs.rows8;
  const bool known = arranged(me.inputs, x, m, &kernels, w.bits, w.group_size);
  if (!known) {
    q.count = 1, q.stride = (w.columns + STEP8 - 1) / STEP8 * STEP8, q.zero = nullptr;
    q.groups = m.inputs == WHIT_PER_GROUP ? q.stride / GROUP8 : 1;
    char* room = me.inputs.room;
    q.codes = (const int8_t*)room, q.scale = (const float*)(room + q.stride);
    q.sums = (const int32_t*)(q.scale + q.groups);
    kernels.quantize(x, me.d.type, w.columns, q.stride, q.groups, (int8_t*)room, (float*)(room + q.stride),
                     (int32_t*)(q.scale + q.groups));
    me.inputs.lanes = (char*)(((uintptr_t)(q.sums + q.groups) + LINE - 1) & ~(uintptr_t)(LINE - 1));
  }
  const bool shifted = !known || p.shift != m.shift;
  p.w = &w, p.x = &q, p.row_sums = nullptr, p.bias = m.bias, p.y = y, p.type = me.d.type;
  p.shift = m.shift, p.unit = m.unit, p.has_table = m.table != nullptr;
  if (m.table) memcpy(p.table, m.table, 16);
  if (shifted) whit_derive8(p, true, kernels, me.inputs.lanes);
  const bool done = by_tiles(w, *whit_kernels(w, WHIT_F32, me.d.isa8), first, last,
                             [&](const whit_weight& part, int64_t from, int64_t to) {
                               p.w = &part;
                               kernels.few(p, from, to, me.params);
                             });
  if (!done) me.run.failed = 1;
}

void floating(Member& me, const whit_matrix& m, const void* x, void* y, int64_t first, int64_t last) {
  if (!arranged(me.inputs, x, m, nullptr, 0, 0)) me.steps.floats(x, m.columns, me.d.type, (float*)me.inputs.room);
  me.steps.dense(m, (const float*)me.inputs.room, first, last, y, me.d.type);
}

// This member's rows of y = m x. Results stay where they are until the team has met.
void multiply(Member& me, const whit_matrix& m, const void* x, void* y, int64_t first, int64_t last) {
  if (first >= last) return;
  if (!m.packed) floating(me, m, x, y, first, last);
  else if (m.inputs == WHIT_EXACT) exact(me, m, x, y, first, last);
  else quantized(me, m, x, y, first, last);
}

void multiply(Member& me, const whit_matrix& m, const void* x, void* y) {
  int64_t first, last;
  me.share(m.rows, ALIGNED_ROWS, first, last);
  multiply(me, m, x, y, first, last);
}

// This member's rows of y = m x, where the rows of m lie in bands: each band's product, then every row in its place.
void multiply_bands(Member& me, const whit_matrix& m, const void* x, char* y, int64_t first, int64_t last) {
  char* below = me.run.banded;
  for (int64_t i = 0; i < m.band_count; i++) {
    multiply(me, m.bands[i], x, below);
    below = me.at(below, m.bands[i].rows);
  }
  me.wait();
  for (int64_t row = first; row < last; row++)
    memcpy(me.at(y, row), me.at(me.run.banded, m.places[row]), element(me.d));
}

}  // namespace
