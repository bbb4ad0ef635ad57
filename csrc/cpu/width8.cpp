// For tests: vectors of 8 floats on any processor, products by their definition, a quarter of each tile, a short reach,
// and threads for little work.
#define FASTHYPER_WIDTH 8
#define FASTHYPER_TILES 4
#define FASTHYPER_REACH (1 << 15)
#define FASTHYPER_WORTH (1 << 12)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "ops.h"
