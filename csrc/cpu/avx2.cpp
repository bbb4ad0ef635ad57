// The kernels for one instruction set: setup.py gives this file its flags.
#include "ops.h"
