// For tests: vectors of 4 floats on any processor, products by their definition, a quarter of each tile, a short reach.
#define FASTHYPER_WIDTH 4
#define FASTHYPER_TILES 4
#define FASTHYPER_REACH (1 << 14)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "ops.h"
