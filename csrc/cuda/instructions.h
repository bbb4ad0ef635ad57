// Instructions of sm_80 and newer: PTX, or the same functions emulated on a CPU.
#pragma once
#ifdef FASTHYPER_EMULATED
#include "emulated.h"
#else
#include "ptx.h"
#endif
