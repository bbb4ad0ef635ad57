// Instructions that sm_90a adds: PTX, or the same functions emulated on a CPU.
#pragma once
#ifdef FASTHYPER_EMULATED
#include "hopper_emulated.h"
#else
#include "hopper_ptx.h"
#endif
