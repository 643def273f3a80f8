// Encoders whose linears are multiplied by AMX, everything else as int8_avx512.cpp has it.
#include "avx512.h"
#include "encoder.h"
#include "tile_ops.h"
#include "transpose.h"

namespace {

#include "kernels.inl"

#include "int8_avx512.h"

struct Amx512 : Vnni512 {
  static constexpr bool TILES = true;
};

#include "int8.inl"
#include "encoder.inl"

}  // namespace

void whit_encode_amx(Crew& crew, const whit_encoder8& e, int64_t first, int64_t count, const Room8& room) {
  encode8<Amx512>(crew, e, first, count, room);
}
