// The instructions that sm_90a adds, under one set of names: PTX, or its emulation on a CPU.
#pragma once
#ifdef FASTHYPER_EMULATED
#include "hopper_emulated.h"
#else
#include "hopper_ptx.h"
#endif
