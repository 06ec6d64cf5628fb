/* Everything that is compiled, as one unit. */
#include "attend.c"
#include "magnitudes.c"
