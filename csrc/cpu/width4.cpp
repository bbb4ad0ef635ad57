// For tests on any processor: vectors of 4 floats, tile sizes divided by 16, and plain loops as products.
// Operands of some KiB are split, and threads start for little work.
#define FASTHYPER_WIDTH 4
#define FASTHYPER_TILE_DIVISOR 16
#define FASTHYPER_REACH (1 << 14)
#define FASTHYPER_THREAD_WORK (1 << 12)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "conv_ops.h"
#include "incidence_ops.h"
#include "mapped_ops.h"
#include "models.h"
