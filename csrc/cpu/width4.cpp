// For tests: vectors of 4 floats on any processor, products by their definition, small tiles, a short reach, and
// threads for little work.
#define FASTHYPER_WIDTH 4
#define FASTHYPER_TILES 16
#define FASTHYPER_REACH (1 << 14)
#define FASTHYPER_WORTH (1 << 12)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "ops.h"
