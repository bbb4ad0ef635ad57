// The kernels for one instruction set, which the compiler's flags in fasthyper/building.py select.
#include "conv_ops.h"
#include "incidence_ops.h"
#include "mapped_ops.h"
#include "models.h"
