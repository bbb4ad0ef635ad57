// What kernels are written in: the instructions of a GPU, or their emulation on a CPU, under one set of names.
#pragma once
#ifdef FASTHYPER_EMULATED
#include "emulated.h"
#else
#include "instructions.h"
#endif
