// For tests: vectors of 8 floats on any processor, products by their definition, half of each tile, a short reach.
#define FASTHYPER_WIDTH 8
#define FASTHYPER_TILES 2
#define FASTHYPER_REACH (1 << 15)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "ops.h"
