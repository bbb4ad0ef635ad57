// The instructions of a GPU, sm_80 and newer, under one set of names: PTX, or its emulation on a CPU.
#pragma once
#ifdef FASTHYPER_EMULATED
#include "emulated.h"
#else
#include "ptx.h"
#endif
