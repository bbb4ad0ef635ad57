// For tests: vectors of 16 floats on any processor, products by their definition, tiles as they are, a short reach, and
// threads for little work.
#define FASTHYPER_WIDTH 16
#define FASTHYPER_TILES 1
#define FASTHYPER_REACH (1 << 16)
#define FASTHYPER_WORTH (1 << 12)
#define FASTHYPER_PLAIN_PRODUCTS
#define FASTHYPER_CHECKED
#include "ops.h"
