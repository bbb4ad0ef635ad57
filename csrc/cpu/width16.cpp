// For tests on any processor: vectors of 16 floats, full tile sizes, and plain loops as products.
// Operands of some KiB are split, and threads start for little work.
#define FASTHYPER_WIDTH 16
#define FASTHYPER_TILE_DIVISOR 1
#define FASTHYPER_REACH (1 << 16)
#define FASTHYPER_THREAD_WORK (1 << 12)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "conv_ops.h"
#include "incidence_ops.h"
#include "mapped_ops.h"
#include "models.h"
