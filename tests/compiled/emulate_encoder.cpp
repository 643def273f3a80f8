// Encoders by AMX's tiles where there is no AMX: csrc/encoder_amx.cpp with WHIT_EMULATE_AMX, called by test_encoder_amx.py.
#include "int8.h"

const Kernels8* whit_kernels8(int) {
  static Kernels8 kernels = {};
  kernels.encode = whit_encode_amx;
  return &kernels;
}
